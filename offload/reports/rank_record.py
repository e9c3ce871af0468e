"""What another rank has counted and recorded, as it sends it to the first one. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...io.timeline import Span

MOST_SPANS = 8192
"""The newest spans of a rank that it sends: less than a megabyte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRecord:
    """The counters of one rank, and its timeline in the clock of the first one."""

    rank: int
    host: str
    """The name of its machine."""
    bytes_read: Mapping[str, int]
    """Bytes read from each tier."""
    bytes_sent: int
    """Bytes of hidden states sent to other ranks."""
    num_sent: int
    """The messages that had them."""
    rank_wait_seconds: float
    """Time that it waited for other ranks."""
    wait_seconds: float
    """Time that it waited for weights."""
    compute_seconds: float
    peak_host_bytes: int
    spans: Sequence[Span] = ()

    def to_json(self, epoch_seconds: float) -> dict[str, Any]:
        """The values to send. `epoch_seconds`: the time of day at which the clock of
        its spans was 0."""
        values = {name: getattr(self, name) for name in self.__slots__}
        newest = sorted(self.spans, key=lambda span: span.end_seconds)[-MOST_SPANS:]
        values["spans"] = [
            [s.lane, s.name, s.start_seconds, s.end_seconds, s.nbytes] for s in newest
        ]
        values["bytes_read"] = dict(self.bytes_read)
        return {**values, "epoch_seconds": epoch_seconds}

    @classmethod
    def of(cls, values: Mapping[str, Any], epoch_seconds: float) -> "RankRecord":
        """What `to_json` made, in a clock that was 0 at `epoch_seconds`. Raises
        TypeError, KeyError or ValueError for anything else."""
        values = dict(values)
        later = values.pop("epoch_seconds") - epoch_seconds
        spans = [
            Span(lane, name, start + later, end + later, nbytes)
            for lane, name, start, end, nbytes in values.pop("spans")
        ]
        return cls(**values, spans=spans)

    def figures(self) -> dict[str, Any]:
        """The counters, for report.json."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "spans"}
