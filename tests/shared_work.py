"""Work in small parts, in which something happens to a worker or to who began it."""

from __future__ import annotations

import json
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
SMALL_STEPS = Policy(
    device_memory="220KiB",
    gather_rows=1000,
    resident_below=10,
    micro_batch_tokens=32,
    tokens_in_flight=64,
    micro_batch_sequences=2,
    sequences_in_flight=8,
)
"""Streams the tiny checkpoint of the examples, with several micro-batches in flight."""
EXACT_STEPS = SMALL_STEPS.with_settings(["sequences_in_flight=4", "coalesce=off"])
"""Its completions are the same bytes whichever rows are beside each other."""


def write_rows(path: Path, num: int, *, wrong: int | None = None) -> Path:
    """Writes `num` texts of several lengths; the row `wrong` has none."""
    rows: list[dict[str, Any]] = [
        {"id": n, "text": "word " * (2 + n * 7 % 5)} for n in range(num)
    ]
    if wrong is not None:
        rows[wrong] = {"id": wrong, "wrong": 1}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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
