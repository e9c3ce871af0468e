"""A tokenizer for models without one: a text consists of token ids."""

from __future__ import annotations


class Numbers:
    """A tokenizer for texts that are written as numbers. No token ends a text."""

    is_fast = False
    eos_token_id = None
    pad_token_id = 0

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))
