"""Completes prompts through transformers' `generate`.

`way_of` makes `DecodingOptions` (decoding_options) from the model's generation config,
the caller's options, and what a row asks for (row_sampling, option_values).
`Completions` (completions) runs one micro-batch with them. `Decoder` (decoding) runs
transformers' own loop, samples each row with its own random state, and drops rows that
have ended (shrinking); `logits` processes the logits. `prompt_chunk` says how many
tokens of a prompt run in one pass, and `Caches` (caches) how many rows fit into memory.
"""
