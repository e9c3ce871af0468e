"""Records the last spans of work in a ring buffer, for plots of a run."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

COMPUTE = "compute"
MICRO_BATCHES = "micro-batches"
WAIT = "wait"
RANKS = "ranks"
"""Waits of this rank for others."""
CASTING = "cast"
STAGING = "staging"
"""Copies to the device from the host memory that disk reads go through."""
ACTIVATIONS = "activations"

MAX_SPANS = 32_768
"""4 MiB of spans: minutes of a model of 80 layers with 8 micro-batches."""


@dataclass(frozen=True, slots=True)
class Span:
    """A span of work, in seconds of one clock.

    `lane` is the kind of work: computing, or a link, named by the tier that it serves.
    `name` is what was worked on: a site or a unit.
    """

    lane: str
    name: str
    start_seconds: float
    end_seconds: float
    nbytes: int = 0
    """Bytes that were moved; 0 if nothing was."""

    @property
    def seconds(self) -> float:
        return self.end_seconds - self.start_seconds


class Record(Protocol):
    """Records a span: (lane, name, start, end, bytes).

    Any thread may call it. It never raises and never waits.
    """

    def __call__(
        self, lane: str, name: str, start: float, end: float, nbytes: int = 0, /
    ) -> None: ...


def unrecorded(
    lane: str, name: str, start: float, end: float, nbytes: int = 0, /
) -> None:
    """A `Record` that records nothing."""


class Timeline:
    """Keeps the last `max_spans` spans. Any thread may record.

    A span costs a fifth of a microsecond, so recording is always on.
    """

    def __init__(self, max_spans: int = MAX_SPANS) -> None:
        self._spans: deque[tuple[str, str, float, float, int]] = deque(maxlen=max_spans)

    def __repr__(self) -> str:
        return f"<Timeline: {len(self._spans)}/{self._spans.maxlen} spans>"

    def record(
        self, lane: str, name: str, start: float, end: float, nbytes: int = 0, /
    ) -> None:
        self._spans.append((lane, name, start, end, nbytes))

    def spans(self) -> list[Span]:
        """All complete spans, sorted by their start.

        Once old spans have been dropped, the time before the oldest kept end is
        incomplete, so spans that start there are left out.
        """
        # An atomic copy: a loop in Python would meet appends of other threads.
        kept = self._spans.copy()
        spans = [Span(*span) for span in kept]
        if spans and len(kept) == self._spans.maxlen:
            first = spans[0].end_seconds
            spans = [span for span in spans if span.start_seconds >= first]
        return sorted(spans, key=lambda span: (span.start_seconds, -span.end_seconds))


def in_turn(spans: Iterable[Span]) -> list[Span]:
    """The spans of one link, each cut to begin when the previous one ended.

    A link serves requests one after the other, but they are made ahead of time. The
    result is sorted by the end of the spans.
    """
    cut: list[Span] = []
    before = float("-inf")
    for span in sorted(spans, key=lambda span: span.end_seconds):
        start = min(max(span.start_seconds, before), span.end_seconds)
        cut.append(replace(span, start_seconds=start))
        before = span.end_seconds
    return cut


def busy_seconds(spans: Iterable[Span]) -> float:
    """The seconds in which at least one of `spans` was under way."""
    total, end = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start_seconds):
        total += max(0.0, span.end_seconds - max(span.start_seconds, end))
        end = max(end, span.end_seconds)
    return total
