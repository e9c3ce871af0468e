"""A job that several processes of this computer share."""

import logging
import shutil
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ...io.closing import Closing
from ...io.devices.accelerators import accelerators, is_accelerator, memory_of
from ...io.errors import UsageError
from ...io.merging import merged
from ...io.sharing.ring import SharedRing
from ...io.tier import Tier
from ..configs.opening import open_model
from ..files.parts import OutputPart
from ..monitoring.memory import available_bytes, usage
from ..policy import Policy, cache_folder
from ..ranks.joining import LOCAL, RankEnvironment, local_store
from ..ranks.remote_ranks import RemoteRanks
from ..tasks.task import Task
from ..tasks.task_progress import add_up
from .ahead import Ahead
from .budgets import Room, bytes_to_divide, divided, threads_of
from .computed import WorkerResult
from .look import ProgressSnapshot, all_of
from .read_once import open_ring, ring_bytes, why_not
from .running import Output
from .worker import Assignment, run_worker
from .worker_pool import WorkerPool

_log = logging.getLogger("penstock")
_CAST = 4
"""The most bytes of a weight after a cast, as a multiple of those in its file."""
_PAGES = 8192


class Sharing(Closing):
    """`num` worker processes compute `parts` into `output`; all but one of them are
    `remote`, if that is given. `ahead` is where the parts come from: closing stops
    it."""

    def __init__(
        self,
        num: int,
        task: Task,
        model: Path,
        policy: Policy,
        parts: Iterable[OutputPart],
        ahead: Ahead[OutputPart],
        output: Output,
        remote: RemoteRanks | None = None,
    ) -> None:
        here = num if remote is None else remote.where.num_local
        gathers = policy.ranks == "gather"
        num_threads = threads_of(torch.get_num_threads(), here)
        room = room_of(model, policy)
        self._ring: SharedRing | None = None
        note = "each rank reads its part of the weights"
        if not gathers:
            self._ring, note = opened_ring(policy, model, num, room)
        ring_bytes = 0 if self._ring is None else self._ring.shape.nbytes
        try:
            budgets = divided(policy, here, replace(room, ring_bytes=ring_bytes))
        except BaseException:
            if self._ring is not None:
                self._ring.close()
            raise
        self.notes = (
            *budgets.notes,
            note,
            f"each worker computes with {num_threads} threads",
        )
        _log.warning("; ".join(self.notes))
        self._num = num
        self._task = task
        self._ahead = ahead
        self._store = None if remote or not gathers else local_store()
        found = []
        for rank, own in enumerate(budgets.policies[: 1 if remote else num]):
            where = None if remote is None else remote.where
            if self._store is not None:
                port = self._store.port
                where = RankEnvironment(rank, num, LOCAL, port, num, rank, True)
            seat = None if self._ring is None else self._ring.seat(rank)
            found.append(Assignment(task, model, own, num_threads, seat, where))
        others = [] if remote is None else remote.ranks
        for one in others:  # each divides the memory of its machine
            one.tell(Assignment(task, model, policy, num_threads))
        targets = [partial(run_worker, assignment=one) for one in found]
        self.pool = WorkerPool([*targets, *others], parts, output, are_ranks=gathers)

    def look(self) -> ProgressSnapshot:
        """The snapshot of all processes together. A process that died counts the rows
        that it handed in."""
        pool, found = self.pool, []
        for place, look in list(pool.looks.items()):
            if place in pool.dead:
                rows = pool.num_handed[place]
                look = replace(look, rows=rows, resident_bytes=0, device_bytes=None)
            found.append(look)
        return all_of(found)

    def computed(self) -> WorkerResult:
        """The counters of all processes together, once all are done, each by its rule.
        The timeline is one worker's."""
        counted: list[WorkerResult] = list(self.pool.counted.values())
        progress = self._task.new_progress()
        add_up(progress, [one.progress for one in counted])
        progress.rows_done = self.pool.num_rows
        progress.rows_failed = self.pool.num_errors
        began = [one.first_unit_at for one in counted if one.first_unit_at is not None]
        last = counted[-1]
        return WorkerResult(
            progress,
            merged([one.statistics for one in counted], self._num),
            last.dtype,
            last.spans,
            min(began, default=None),
        )

    def close(self) -> None:
        self._ahead.stop()  # or a thread that waits for rows would be waited for
        self.pool.close()
        if self._ring is not None:
            self._ring.close()


def check_workers(num: int) -> None:
    """Raises UsageError for a number of workers below 1."""
    if num < 1:
        raise UsageError(f"--workers {num}: at least one has to do it")


def check_ranks(num: int, workers: int, started: int = 1) -> None:
    """Raises UsageError for a number of ranks below 1, or workers beside them, or
    either beside ranks that torchrun has `started`."""
    if num < 1:
        raise UsageError(f"--ranks {num}: at least one has to do it")
    if num > 1 and workers > 1:
        raise UsageError(
            f"--ranks {num} share one model, and --workers {workers} have one each: "
            "leave one of the two out"
        )
    if started > 1 and max(num, workers) > 1:
        raise UsageError(
            f"torchrun has started {started} ranks (WORLD_SIZE): leave --ranks and "
            "--workers out, or unset RANK and WORLD_SIZE"
        )


def opened_ring(
    policy: Policy, model: Path, num: int, room: Room
) -> tuple[SharedRing | None, str]:
    """The memory that `num` workers share what they read through, if they do; and a
    sentence about it."""
    stamps = open_model(model).stamps
    note = why_not(policy, stamps)
    if note is not None:
        return None, note
    model_bytes = sum(stamp.size_bytes for stamp in stamps.values())
    nbytes = ring_bytes(model_bytes, bytes_to_divide(policy, room))
    return open_ring(policy, num, nbytes)


def room_of(model: Path, policy: Policy) -> Room:
    """The memory of this machine that processes with `model` divide."""
    entries = open_model(model).entries.values()
    nbytes = sum(entry.nbytes for entry in entries) + _PAGES * (len(entries) + 1)
    folder = cache_folder(policy.io).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = available_bytes()
    num_gpus, on_device = 0, free
    if is_accelerator(policy.device):
        names = accelerators()
        num_gpus = len(names)
        every = ":" not in policy.device and num_gpus > 1
        on_device = min(
            memory_of(name)[0] for name in (names if every else [policy.device])
        )
    return Room(
        num_gpus=num_gpus,
        free_bytes={
            Tier.DEVICE: on_device,
            Tier.HOST: free,
            Tier.DISK: shutil.disk_usage(there).free,
        },
        taken_bytes=usage().resident_bytes,
        model_bytes=nbytes if policy.dtype == "auto" else _CAST * nbytes,
    )
