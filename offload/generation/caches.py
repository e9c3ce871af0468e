"""Limits how many completions run at one time, if transformers' own caches keep their
keys and values in host memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from ..settings.contradictions import keeps_kv
from ..units.wish import cache_bytes_per_token
from .completions import Prompt

if TYPE_CHECKING:
    from ..engine.engine import Engine

_GROWING = 1.5
"""How many times its final size a cache takes: each token makes a new one, and the heap
keeps pieces of the old ones."""


class Caches:
    """Counts the bytes that the caches of sequences in flight will have.

    If `room_bytes` is None, nothing is limited. `token_bytes` are the bytes of one
    token of one sequence.
    """

    def __init__(self, *, room_bytes: int | None, token_bytes: int) -> None:
        self._room_bytes = room_bytes if token_bytes else None
        self._token_bytes = token_bytes
        self._held_bytes = 0

    @classmethod
    def of(cls, engine: "Engine", model: Any) -> Self:
        """The count for a streamed `model`. It limits nothing if keys and values are
        elsewhere."""
        policy, arrangement = engine.policy, engine.arrangement
        is_counted = policy.device == "cpu" and not keeps_kv(policy)
        if not is_counted:
            return cls(room_bytes=None, token_bytes=0)
        each = cache_bytes_per_token(model, arrangement.division, arrangement.recipes)
        room, each = engine.budget.waiting, int(each * _GROWING)
        if engine.exchange is not None:  # all ranks make the same micro-batches
            room, each = engine.exchange.agree([room, each])
        return cls(room_bytes=room, token_bytes=each)

    def most_rows(self, prompts: Sequence[Prompt], most: int) -> int:
        """How many rows of a micro-batch with these `prompts` have room: from 1 to
        `most`."""
        if self._room_bytes is None or not prompts:
            return most
        each = max(map(self._bytes_of, prompts))
        return max(1, min(most, self._room_bytes // each))

    def has_room(self, prompts: Sequence[Prompt]) -> bool:
        """Whether `prompts` may start. They always may if nothing else is in flight."""
        if self._room_bytes is None or not self._held_bytes:
            return True
        return self._held_bytes + self._bytes_of(*prompts) <= self._room_bytes

    @contextmanager
    def holding(self, prompts: Sequence[Prompt]) -> Iterator[None]:
        """Counts `prompts` as in flight for the time of the `with` block."""
        nbytes = self._bytes_of(*prompts)
        self._held_bytes += nbytes
        try:
            yield
        finally:
            self._held_bytes -= nbytes

    def _bytes_of(self, *prompts: Prompt) -> int:
        """The bytes of prompts that share a cache, which is as long as the longest of
        them."""
        longest = max((len(prompt.ids) for prompt in prompts), default=0)
        new = max((prompt.way.max_new_tokens for prompt in prompts), default=0)
        sequences = sum(prompt.way.num_sequences for prompt in prompts)
        return sequences * (longest + new) * self._token_bytes
