"""Counts what keys and values cost: bytes written, read, moved again."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class KvStatistics:
    """Counters of all caches since the model was loaded, by tier where there are
    several: `device`, `host`, `disk`."""

    num_appended: int = 0
    """Tokens that were appended, counted in every layer that keeps them."""
    bytes_written: Mapping[str, int] = field(default_factory=dict)
    """Each appended token once."""
    bytes_read: Mapping[str, int] = field(default_factory=dict)
    """Brought to where attention reads them; nothing where that is where they lie."""
    bytes_moved: int = 0
    """Of tokens that were there already: beams that change places, sliding windows that
    come to the end of their memory, sequences longer than was said."""
    bytes_held: Mapping[str, int] = field(default_factory=dict)
    """Taken from each tier's budget now."""
    peak_bytes_held: Mapping[str, int] = field(default_factory=dict)
    wait_seconds: float = 0.0
    """That the computing thread stood still for them; a GPU's own waiting for copies
    that are queued is not seen."""


class KvCount:
    """The counters, as the caches of one model advance them."""

    def __init__(self) -> None:
        self.num_appended = 0
        self.written: Counter[str] = Counter()
        self.read: Counter[str] = Counter()
        self.moved = 0
        self.wait_seconds = 0.0

    def append(self, tier: str, num_tokens: int, nbytes: int) -> None:
        self.num_appended += num_tokens
        self.written[tier] += nbytes

    def statistics(
        self, held: Mapping[str, int], peak: Mapping[str, int]
    ) -> KvStatistics:
        return KvStatistics(
            self.num_appended,
            dict(self.written),
            dict(self.read),
            self.moved,
            dict(held),
            dict(peak),
            self.wait_seconds,
        )
