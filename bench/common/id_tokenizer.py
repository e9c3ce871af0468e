"""A tokenizer for models that have none: texts are ids."""

from __future__ import annotations


class Numbers:
    """Plays the tokenizer: a text is written as its ids, and no token ends one."""

    is_fast = False
    eos_token_id = None
    pad_token_id = 0

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))
