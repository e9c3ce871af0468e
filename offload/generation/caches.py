"""How many completions have room for their keys and values, where transformers' own
caches keep them in the host's memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from ..settings.contradictions import keeps_kv
from ..units.wish import cache_bytes_per_token
from .completions import Prompt

if TYPE_CHECKING:
    from ..engine.engine import Engine

_GROWING = 1.5
"""Of what a cache has in the end: each token's is a new one, and the heap keeps pieces
of the old ones."""


class Caches:
    """Counts what the caches of sequences in flight will come to. `room_bytes` None:
    nobody counts."""

    def __init__(self, *, room_bytes: int | None, token_bytes: int) -> None:
        self._room_bytes = room_bytes if token_bytes else None
        self._token_bytes = token_bytes
        self._held_bytes = 0

    @classmethod
    def of(cls, engine: "Engine", model: Any) -> Self:
        """For a streamed `model`."""
        policy, arrangement = engine.policy, engine.arrangement
        is_counted = policy.device == "cpu" and not keeps_kv(policy)
        each = cache_bytes_per_token(model, arrangement.division, arrangement.recipes)
        return cls(
            room_bytes=engine.budget.waiting if is_counted else None,
            token_bytes=int(each * _GROWING),
        )

    def most_rows(self, prompts: Sequence[Prompt], most: int) -> int:
        """How many rows of a micro-batch have room: 1 to `most`."""
        if self._room_bytes is None or not prompts:
            return most
        each = max(map(self._bytes_of, prompts))
        return max(1, min(most, self._room_bytes // each))

    def has_room(self, prompts: Sequence[Prompt]) -> bool:
        """Whether these may start; they may where nobody else has anything."""
        if self._room_bytes is None or not self._held_bytes:
            return True
        return self._held_bytes + self._bytes_of(*prompts) <= self._room_bytes

    @contextmanager
    def holding(self, prompts: Sequence[Prompt]) -> Iterator[None]:
        """For as long as they are in flight."""
        nbytes = self._bytes_of(*prompts)
        self._held_bytes += nbytes
        try:
            yield
        finally:
            self._held_bytes -= nbytes

    def _bytes_of(self, *prompts: Prompt) -> int:
        """Of prompts that share a cache, which is as long as the longest of them."""
        longest = max((len(prompt.ids) for prompt in prompts), default=0)
        new = max((prompt.way.max_new_tokens for prompt in prompts), default=0)
        sequences = sum(prompt.way.num_sequences for prompt in prompts)
        return sequences * (longest + new) * self._token_bytes
