"""Samples of a job's progress and resources, and what a sequence of them says. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

MAX_SAMPLES = 600
_MAX_STEPS = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceSample:
    """Counters of a job at one time."""

    seconds: float
    """Seconds since the job began."""
    stage: str
    """`loading`, or what the job does with its rows."""
    stage_seconds: float
    """Seconds since this stage began."""
    rows: float = 0.0
    """Rows that are done, with fractions for those in flight."""
    rows_before: int = 0
    """The rows among them that an earlier run of the job had done."""
    num_rows: int | None = None
    """Rows of the whole job; None if that is not known."""
    tokens: int = 0
    """Tokens that went through the model; in generation, tokens that it made."""
    tokens_through: float = 0.0
    """The same, with fractions for those in flight."""
    seconds_left: float | None = None
    """Seconds until all rows are done; None if that is not known."""
    passes: int = 0
    """Passes over the weights that have begun."""
    wait_seconds: float = 0.0
    compute_seconds: float = 0.0
    bytes_read: Mapping[str, int]
    """Bytes read from each tier."""
    num_ranks: int = 1
    """The ranks that share the model; the other counters are of the first one."""
    rank_wait_seconds: float = 0.0
    """Seconds that it waited for other ranks."""
    rank_bytes_sent: int = 0
    """Bytes of hidden states that it sent to other ranks."""
    resident_bytes: int = 0
    """Bytes of memory of this process."""
    device_bytes: int | None = None
    """Bytes of GPU memory in use; None without a GPU."""

    @property
    def tokens_per_second(self) -> float:
        """The mean speed since this stage began."""
        if self.stage_seconds <= 0:
            return 0.0
        return max(self.tokens, self.tokens_through) / self.stage_seconds

    @property
    def is_first_pass(self) -> bool:
        """Whether no pass over the weights has ended yet."""
        return self.passes <= 1


@dataclass(frozen=True, slots=True)
class Window:
    """Two samples of one stage, a few seconds apart."""

    before: ResourceSample
    now: ResourceSample

    @property
    def bytes_per_second(self) -> dict[str, float]:
        """Bytes per second that came from each tier between the two samples."""
        seconds = self.now.seconds - self.before.seconds
        if seconds <= 0:
            return dict.fromkeys(self.now.bytes_read, 0.0)
        return {
            tier: (nbytes - self.before.bytes_read.get(tier, 0)) / seconds
            for tier, nbytes in self.now.bytes_read.items()
        }

    @property
    def waiting(self) -> float:
        """The share of the time that computing waited for weights, 0 to 1."""
        waited = self.now.wait_seconds - self.before.wait_seconds
        computed = self.now.compute_seconds - self.before.compute_seconds
        busy = waited + computed
        return max(0.0, waited) / busy if busy > 0 else 0.0


class Samples:
    """Keeps at most `max_samples` samples.

    First it keeps every one, then every second, every fourth, and so on. So a job of a
    week takes as little memory as one of a minute.
    """

    def __init__(self, max_samples: int = MAX_SAMPLES) -> None:
        assert max_samples >= 2, "the first and the last"
        self._max_samples = max_samples
        self._kept: list[ResourceSample] = []
        self._every = 1
        self._num_seen = 0
        self._last: ResourceSample | None = None

    def __len__(self) -> int:
        return len(self.all())

    def add(self, sample: ResourceSample) -> None:
        if self._num_seen % self._every == 0:
            if len(self._kept) >= self._max_samples - 1:
                self._kept = self._kept[::2]
                self._every *= 2
            if self._num_seen % self._every == 0:
                self._kept.append(sample)
        self._num_seen += 1
        self._last = sample

    def all(self) -> list[ResourceSample]:
        """The samples that are kept, in order, and the newest one."""
        last = [] if self._last is None else [self._last]
        kept = list(self._kept)
        return kept if kept[-1:] == last else kept + last


@dataclass(frozen=True, slots=True)
class Step:
    """The mean speed between two times, in seconds since the job began."""

    start_seconds: float
    end_seconds: float
    tokens_per_second: float


def speeds(samples: Sequence[ResourceSample]) -> list[Step]:
    """The speed of each pass, or of several passes together.

    All rows of a pass are counted at its end, so shorter times would show only that.
    """
    computing = [s for s in samples if s.passes]
    if len(computing) < 2:
        return []
    bounds = [computing[0]]
    for before, after in pairwise(computing):
        if after.passes > before.passes and after.tokens > bounds[-1].tokens:
            bounds.append(after)
    if bounds[-1] is not computing[-1] and computing[-1].tokens > bounds[-1].tokens:
        bounds.append(computing[-1])
    stride = -(-len(bounds) // _MAX_STEPS)
    if stride > 1:
        bounds = [*bounds[:-1:stride], bounds[-1]]
    return [
        Step(a.seconds, b.seconds, (b.tokens - a.tokens) / (b.seconds - a.seconds))
        for a, b in pairwise(bounds)
        if b.seconds > a.seconds
    ]
