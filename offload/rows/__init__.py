"""Turns rows into token ids.

`text` tokenizes texts, prompts and completions, `labels` prompts with labels, and
`chat` messages, with a chat template that is checked (template_check) and limited
(template_budget, template_steps). `limits` says which ids, and how many, a model takes;
`tokenizer_check` refuses tokenizers that make texts much longer. A `RowError`
(row_error) ends one row.
"""
