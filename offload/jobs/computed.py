"""A model that is loaded for a job, and the statistics of computing with it, in one
process or several."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...io.closing import Closing
from ...io.kv.count import KvStatistics
from ...io.timeline import Span
from ..engine.counters import Statistics
from ..model import engine_of, load_for, unwrap
from ..policy import Policy
from ..rows.text import load_tokenizer
from ..settings.memory_budget import Use
from ..tasks.task_progress import TaskProgress
from .look import ProgressSnapshot, look_at


@dataclass(frozen=True, slots=True)
class WorkerResult:
    """The counters of one process that computed for a job."""

    progress: TaskProgress
    statistics: Statistics
    dtype: str
    """The dtype that the largest tensor computes in."""
    spans: Sequence[Span] = ()
    """The timeline of the last passes; empty while the job runs."""
    first_unit_at: float | None = None
    """When the first unit began to compute (`time.perf_counter`)."""


class Loaded(Closing):
    """The checkpoint `model`, streamed under `policy`, and its tokenizer. Raises what
    `load` raises, and UsageError where there is no tokenizer."""

    def __init__(self, model: Path, policy: Policy, use: Use = "any") -> None:
        self.model: Any = load_for(use, model, policy)
        try:
            self.tokenizer: Any = load_tokenizer(
                model, trust_remote_code=policy.trust_remote_code
            )
        except BaseException:
            unwrap(self.model)
            raise
        self.engine = engine_of(self.model)
        largest = max(self.engine.recipes.values(), key=lambda recipe: recipe.nbytes)
        self._dtype = str(largest.dtype).removeprefix("torch.")
        self._is_closed = False

    def look(self, progress: TaskProgress) -> ProgressSnapshot:
        return look_at(self.engine, progress)

    def counted(self, progress: TaskProgress) -> WorkerResult:
        """The counters so far."""
        return WorkerResult(progress, self.engine.statistics(), self._dtype)

    def computed(self, progress: TaskProgress) -> WorkerResult:
        """The counters at the end, with the timeline."""
        return replace(
            self.counted(progress),
            spans=self.engine.timeline.spans(),
            first_unit_at=self.engine.first_unit_at,
        )

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            unwrap(self.model)


def together(found: Sequence[Statistics], num_workers: int) -> Statistics:
    """The statistics of a job that `num_workers` shared, from those of all its
    processes, also of processes that died and were replaced. Counters and memory are
    sums (memory that processes share is counted in each), times are means over the
    workers, limits and maxima of one model are the largest of any. Where weights are is
    taken from the first."""
    first = found[0]
    sums = (
        "bytes_loaded",
        "bytes_gathered",
        "bytes_copied",
        "passes",
        "activation_bytes_out",
        "activation_bytes_in",
        "num_activation_buffers",
        "num_joint_calls",
        "num_joint_rows",
        "num_failed_joint_calls",
        "num_unused_loads",
    )
    of_workers = found[-num_workers:]  # the processes that reached the end
    memory = ("device_memory_bytes", "peak_device_bytes", "peak_host_bytes")
    times = ("wait_seconds", "compute_seconds")
    mosts = ("max_in_flight", "held_bytes_per_micro_batch")
    changed: dict[str, Any] = {
        **{name: sum(getattr(one, name) for one in found) for name in sums},
        **{name: sum(getattr(one, name) for one in of_workers) for name in memory},
        **{n: sum(getattr(one, n) for one in found) / num_workers for n in times},
        **{name: max(getattr(one, name) for one in found) for name in mosts},
    }
    return replace(
        first,
        bytes_read=_sums(one.bytes_read for one in found),
        faults=_sums(one.faults for one in found),
        fallbacks=tuple(dict.fromkeys(f for one in found for f in one.fallbacks)),
        kv=_kv([one.kv for one in found], num_workers),
        **changed,
    )


def _kv(found: Sequence[KvStatistics], num_workers: int) -> KvStatistics:
    return KvStatistics(
        sum(one.num_appended for one in found),
        _sums(one.bytes_written for one in found),
        _sums(one.bytes_read for one in found),
        sum(one.bytes_moved for one in found),
        _sums(one.bytes_held for one in found),
        _sums(one.peak_bytes_held for one in found),
        sum(one.wait_seconds for one in found) / num_workers,
    )


def _sums(found: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in found:
        total.update(one)
    return dict(total)
