"""Work in small parts, in which something happens to a worker or to who began it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock import Policy
from penstock.offload.files.parts import Cut, NumberedRows
from penstock.offload.tasks.generate_task import Generate
from penstock.offload.tasks.score_task import Score
from penstock.offload.tasks.task_progress import TaskProgress

PARENT, WORKER = "parent", "worker"


@dataclass(frozen=True)
class Eventful:
    """With its third result, the first worker that comes so far sends `number` to
    whom."""

    marker: Path | None = None
    whom: str = WORKER
    number: int = signal.SIGKILL

    def cut(self, policy: Policy) -> Cut:
        return Cut(6, 1 << 20)

    def results(
        self,
        model: Any,
        tokenizer: Any,
        parts: Iterator[NumberedRows],
        progress: TaskProgress,
    ) -> Iterator[dict[str, Any]]:
        found = super().results(model, tokenizer, parts, progress)  # type: ignore[misc]
        for index, result in enumerate(found):
            if index == 2 and self.marker is not None:
                self._happen(self.marker)
            yield result

    def _happen(self, marker: Path) -> None:
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            return
        if self.whom == WORKER:
            os.kill(os.getpid(), self.number)
            return
        marker.write_text(f"{os.getpid()}")
        parent = multiprocessing.parent_process()
        assert parent is not None, "a worker has one"
        assert parent.pid is not None, "which has begun"
        os.kill(parent.pid, self.number)
        if self.number == signal.SIGKILL:
            threading.Event().wait()  # what it does at that time does not matter


@dataclass(frozen=True)
class Generating(Eventful, Generate):
    pass


@dataclass(frozen=True)
class Scoring(Eventful, Score):
    pass
