"""Counts the bytes of keys and values that are written, read, and moved."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ..merging import Rule, counter


@dataclass(frozen=True, slots=True)
class KvStatistics:
    """Counters of all caches since the model was loaded.

    Mappings are by tier: `device`, `host`, `disk`.
    """

    num_appended: int = counter(Rule.SUM)
    """Appended tokens, counted once in each layer that keeps them."""
    bytes_written: Mapping[str, int] = counter(Rule.SUM, dict)
    """Bytes of appended tokens."""
    bytes_read: Mapping[str, int] = counter(Rule.SUM, dict)
    """Bytes that were fetched for attention; 0 where attention reads them in place."""
    bytes_moved: int = counter(Rule.SUM)
    """Bytes of old tokens that were moved. That happens if beams are reordered, if a
    sliding window reaches the end of its memory, or if a sequence gets longer than was
    announced."""
    bytes_held: Mapping[str, int] = counter(Rule.SUM, dict)
    """Bytes that are taken from each tier's budget now."""
    peak_bytes_held: Mapping[str, int] = counter(Rule.SUM, dict)
    wait_seconds: float = counter(Rule.MEAN, 0.0)
    """How long the computing thread waited for fetches. The time that a GPU waits for
    queued copies is not included."""


class KvCount:
    """Counts for all caches of one model."""

    def __init__(self) -> None:
        self.num_appended = 0
        self.written: Counter[str] = Counter()
        self.read: Counter[str] = Counter()
        self.moved = 0
        self.wait_seconds = 0.0

    def append(self, tier: str, num_tokens: int, nbytes: int) -> None:
        """Counts `num_tokens` tokens of `nbytes` that were appended in `tier`."""
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
