"""How many completions have room for their keys and values, where transformers' own
caches keep them in the host's memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from ..settings.contradictions import keeps_kv
from ..units.wish import cache_bytes_per_token
from .completions import Completions, Prompt

if TYPE_CHECKING:
    from ..engine import Engine

_GROWING = 1.5
"""Of what a cache has in the end: each token's is a new one, and the heap keeps pieces
of the old ones."""


class Caches:
    """Counts what the caches of sequences in flight will come to. `room_bytes` None:
    nobody counts."""

    def __init__(
        self, *, room_bytes: int | None, token_bytes: int, new_tokens: int
    ) -> None:
        self._room_bytes = room_bytes if token_bytes else None
        self._token_bytes = token_bytes
        self._new_tokens = new_tokens
        self._held_bytes = 0

    @classmethod
    def of(cls, engine: "Engine", model: Any, completions: Completions) -> Self:
        """For a streamed `model`."""
        policy, arrangement = engine.policy, engine.arrangement
        is_counted = policy.device == "cpu" and not keeps_kv(policy)
        each = cache_bytes_per_token(model, arrangement.division, arrangement.recipes)
        return cls(
            room_bytes=engine.budget.waiting if is_counted else None,
            token_bytes=int(each * completions.num_beams * _GROWING),
            new_tokens=completions.max_new_tokens,
        )

    def most_rows(self, prompts: Sequence[Prompt], most: int) -> int:
        """Of a micro-batch, so that one has room: at most `most`, at least one."""
        if self._room_bytes is None or not prompts:
            return most
        longest = max(len(prompt.ids) for prompt in prompts)
        each = self._token_bytes * (longest + self._new_tokens)
        return max(1, min(most, self._room_bytes // each))

    def has_room(self, prompts: Sequence[Prompt]) -> bool:
        """Whether these may start; they may where nobody else has anything."""
        if self._room_bytes is None or not self._held_bytes:
            return True
        return self._held_bytes + self._bytes_of(prompts) <= self._room_bytes

    @contextmanager
    def holding(self, prompts: Sequence[Prompt]) -> Iterator[None]:
        """For as long as they are in flight."""
        nbytes = self._bytes_of(prompts)
        self._held_bytes += nbytes
        try:
            yield
        finally:
            self._held_bytes -= nbytes

    def _bytes_of(self, prompts: Sequence[Prompt]) -> int:
        longest = max((len(prompt.ids) for prompt in prompts), default=0)
        tokens = len(prompts) * (longest + self._new_tokens)
        return tokens * self._token_bytes
