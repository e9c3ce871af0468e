"""Jobs of several ranks in processes of their own, which are killed."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

import forked_python
from penstock import Policy
from penstock.offload.files.parts import Cut
from penstock.offload.jobs import ranked
from penstock.offload.jobs.job import Job
from penstock.offload.jobs.ranked import OtherRanks
from penstock.offload.tasks.generate_task import Generate
from penstock.offload.tasks.score_task import Score
from penstock.offload.tasks.task import Task

PARTS_OF = 5
END_SECONDS = 30.0
"""How long the other ranks have to end; five, on a machine that is not busy."""


@dataclass(frozen=True)
class ShortScore(Score):
    """Scores in parts of five rows."""

    def cut(self, policy: Policy) -> Cut:
        return Cut(PARTS_OF, 1 << 20)


@dataclass(frozen=True)
class ShortGenerate(Generate):
    """Completes in parts of five rows."""

    def cut(self, policy: Policy) -> Cut:
        return Cut(PARTS_OF, 1 << 20)


@dataclass(frozen=True)
class RankedJob:
    """A job of `num` ranks, to be run in a process of its own."""

    task: Task
    folder: Path
    source: Path
    output: Path
    policy: Policy
    num: int = 2

    @property
    def rank_file(self) -> Path:
        """Has the process id of the last rank that began."""
        return self.output.with_suffix(".rank")

    def start(self) -> Any:
        """Starts a process that runs the job."""
        forked_python.ensure_running()
        self.rank_file.unlink(missing_ok=True)
        address = forkserver._forkserver._forkserver_address  # type: ignore[attr-defined]
        process = forked_python.context.Process(target=_run, args=(self, address))
        process.start()
        return process

    def run_for(self, seconds: float, whom: int) -> int:
        """Runs the job, and kills the rank `whom` (0, or 1 where it has begun) after
        `seconds`. Returns the exit code of the first rank, once all have ended."""
        process = self.start()
        process.join(seconds)
        if process.exitcode is None:
            victim = process.pid
            if whom and self.rank_file.exists():
                victim = int(self.rank_file.read_text() or victim)
            with suppress(psutil.NoSuchProcess):
                psutil.Process(victim).kill()
        process.join(END_SECONDS)
        code = process.exitcode
        assert code is not None, "the first rank ends when another one is gone"
        process.close()
        self._wait_for_others()
        return int(code)

    def _wait_for_others(self) -> None:
        if not self.rank_file.exists():
            return
        pid, end = int(self.rank_file.read_text() or 0), time.monotonic() + END_SECONDS
        while pid and psutil.pid_exists(pid):
            assert time.monotonic() < end, "no rank outlives the first"
            time.sleep(0.05)


class _Recorded(ForkServerProcess):
    """Writes its process id to the file that its name ends with."""

    def start(self) -> None:
        super().start()
        name = self.name.partition("@")[2]
        partial = Path(f"{name}.new")
        partial.write_text(f"{self.pid}")
        partial.rename(name)


def _run(job: RankedJob, address: str) -> None:
    """Other ranks are forked from the process that this one was forked from."""
    known: Any = forkserver._forkserver
    known._forkserver_address = address
    known.ensure_running = lambda: None

    class Context:
        @staticmethod
        def Process(*, target: Any, args: Any, name: str) -> Any:
            return _Recorded(target=target, args=args, name=f"{name}@{job.rank_file}")

    ranked._SPAWN = Context  # type: ignore[assignment]
    others = OtherRanks(job.num)
    with others:
        Job(
            job.task, job.folder, job.source, job.output, job.policy, others=others
        ).run(Console(quiet=True))
