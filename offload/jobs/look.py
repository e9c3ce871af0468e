"""A snapshot of how far a job is, in one process or in all that share it."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import psutil

from ...io.devices.accelerators import allocated_bytes
from ..engine.engine import Engine
from ..tasks.task_progress import TaskProgress


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressSnapshot:
    """Counters since the model was loaded, as in `ResourceSample`."""

    rows: float = 0.0
    tokens: int = 0
    tokens_through: float = 0.0
    passes: int = 0
    wait_seconds: float = 0.0
    compute_seconds: float = 0.0
    bytes_read: Mapping[str, int] = field(default_factory=dict)
    num_ranks: int = 1
    """The ranks that share the model."""
    rank_wait_seconds: float = 0.0
    """How long this rank has waited for others."""
    rank_bytes_sent: int = 0
    """Bytes of hidden states that this rank has sent to others."""
    resident_bytes: int = 0
    device_bytes: int | None = None


def look_at(engine: Engine, progress: TaskProgress) -> ProgressSnapshot:
    """The snapshot of a model in this process."""
    statistics, fraction = engine.statistics(), engine.pass_fraction
    return ProgressSnapshot(
        rows=progress.rows_through(fraction),
        tokens=progress.tokens_counted,
        tokens_through=progress.tokens_through(fraction),
        passes=statistics.passes,
        wait_seconds=statistics.wait_seconds,
        compute_seconds=statistics.compute_seconds,
        bytes_read=statistics.bytes_read,
        num_ranks=statistics.ranks.num_ranks,
        rank_wait_seconds=statistics.ranks.wait_seconds,
        rank_bytes_sent=statistics.ranks.bytes_sent,
        resident_bytes=resident_bytes(),
        device_bytes=_device_bytes(engine.policy.device),
    )


def resident_bytes() -> int:
    """The resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def all_of(looks: Iterable[ProgressSnapshot]) -> ProgressSnapshot:
    """The sum of several snapshots. Memory that processes share is counted in each."""
    looks = list(looks)
    read: Counter[str] = Counter()
    for look in looks:
        read.update(look.bytes_read)
    on_gpus = [look.device_bytes for look in looks if look.device_bytes is not None]
    return ProgressSnapshot(
        rows=sum(look.rows for look in looks),
        tokens=sum(look.tokens for look in looks),
        tokens_through=sum(look.tokens_through for look in looks),
        passes=sum(look.passes for look in looks),
        wait_seconds=sum(look.wait_seconds for look in looks),
        compute_seconds=sum(look.compute_seconds for look in looks),
        bytes_read=dict(read),
        resident_bytes=sum(look.resident_bytes for look in looks),
        device_bytes=sum(on_gpus) if on_gpus else None,
    )


def _device_bytes(device: str) -> int | None:
    if device == "cpu":
        return None
    return allocated_bytes(device)
