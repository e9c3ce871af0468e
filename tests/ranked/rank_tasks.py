"""Scores rows in small parts, until something happens to a rank."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock import Policy
from penstock.offload.files.parts import Cut, NumberedRows
from penstock.offload.tasks.score_task import Score
from penstock.offload.tasks.task_progress import TaskProgress


@dataclass(frozen=True)
class FallingScore(Score):
    """With its eighth result, a rank other than the first sends itself `number` (or
    with `hits_first` the first), once: then there is `marker`, with its process id."""

    marker: Path | None = None
    first: int = 0
    """The process id of the first rank."""
    number: int = 0
    hits_first: bool = False

    def cut(self, policy: Policy) -> Cut:
        return Cut(6, 1 << 20)

    def results(
        self,
        model: Any,
        tokenizer: Any,
        parts: Iterator[NumberedRows],
        progress: TaskProgress,
    ) -> Iterator[dict[str, Any]]:
        found = super().results(model, tokenizer, parts, progress)
        for index, result in enumerate(found):
            is_other = self.marker is not None and os.getpid() != self.first
            if index == 7 and is_other and self.marker is not None:
                try:
                    with self.marker.open("x") as marker:
                        marker.write(f"{os.getpid()}")
                except FileExistsError:  # another rank was first
                    is_other = False
            if index == 7 and is_other:
                whom = self.first if self.hits_first else os.getpid()
                os.kill(whom, self.number)
            yield result
