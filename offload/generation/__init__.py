"""How prompts are completed, through transformers' `generate`: `way` is one set of its
options, `completions` one micro-batch, `decoding` and `logits` what is added to it."""
