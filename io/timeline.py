"""What happened when: a ring of the last spans of work, for the pictures of a run."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

COMPUTE = "compute"
MICRO_BATCHES = "micro-batches"
WAIT = "wait"
CAST = "cast"
STAGING = "staging"
"""From the host memory that is between disk and device."""
ACTIVATIONS = "activations"

MAX_SPANS = 32_768
"""4 MiB of them: minutes of a model of 80 layers with 8 micro-batches."""


@dataclass(frozen=True, slots=True)
class Span:
    """Work of one kind (`lane`: computing, or a link by the tier at its end) on one
    thing (`name`: a site, a unit), in seconds of one clock."""

    lane: str
    name: str
    start_seconds: float
    end_seconds: float
    nbytes: int = 0
    """Moved meanwhile; 0 where nothing moves."""

    @property
    def seconds(self) -> float:
        return self.end_seconds - self.start_seconds


class Record(Protocol):
    """Writes a span down: (lane, name, start, end, bytes). May be called by any thread;
    never raises, never waits."""

    def __call__(
        self, lane: str, name: str, start: float, end: float, nbytes: int = 0, /
    ) -> None: ...


def unrecorded(
    lane: str, name: str, start: float, end: float, nbytes: int = 0, /
) -> None:
    """For those whom nobody watches."""


class Timeline:
    """Keeps the last `max_spans`, by any number of threads: a fifth of a microsecond
    each, so it is always on."""

    def __init__(self, max_spans: int = MAX_SPANS) -> None:
        self._spans: deque[tuple[str, str, float, float, int]] = deque(maxlen=max_spans)

    def __repr__(self) -> str:
        return f"<Timeline: {len(self._spans)}/{self._spans.maxlen} spans>"

    def record(
        self, lane: str, name: str, start: float, end: float, nbytes: int = 0, /
    ) -> None:
        self._spans.append((lane, name, start, end, nbytes))

    def spans(self) -> list[Span]:
        """All that are kept, by their start. Those of before the last one that was
        forgotten had ended are not whole, and left out."""
        # A copy in one piece: iterating in Python would meet others' appends.
        kept = self._spans.copy()
        found = [Span(*span) for span in kept]
        if found and len(kept) == self._spans.maxlen:
            first = found[0].end_seconds
            found = [span for span in found if span.start_seconds >= first]
        return sorted(found, key=lambda span: (span.start_seconds, -span.end_seconds))


def in_turn(spans: Iterable[Span]) -> list[Span]:
    """The spans of one link, each from when the one before it had ended: a link brings
    what it is asked for in turn, and is asked ahead of time. By their end."""
    found: list[Span] = []
    before = float("-inf")
    for span in sorted(spans, key=lambda span: span.end_seconds):
        start = min(max(span.start_seconds, before), span.end_seconds)
        found.append(replace(span, start_seconds=start))
        before = span.end_seconds
    return found


def busy_seconds(spans: Iterable[Span]) -> float:
    """How long at least one of `spans` was under way."""
    total, end = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start_seconds):
        total += max(0.0, span.end_seconds - max(span.start_seconds, end))
        end = max(end, span.end_seconds)
    return total
