"""Tasks whose rows run through the model once, packed into micro-batches."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .task import Task
from .task_progress import ScoreProgress, TaskProgress

if TYPE_CHECKING:
    from ..files.parts import NumberedRows
    from .packed import RowRunner


@dataclass(frozen=True)
class PackedTask(Task):
    """A task that has a runner for pieces of rows. `Packed` does the packing and the
    order of results."""

    @abstractmethod
    def runner(self, model: Any, tokenizer: Any) -> "RowRunner[Any, Any]":
        """What cuts rows into pieces, runs the streamed `model` on some of them and
        makes results. Raises UsageError for options that do not fit the model."""

    def new_progress(self) -> ScoreProgress:
        return ScoreProgress()

    def results(
        self,
        model: Any,
        tokenizer: Any,
        parts: "Iterator[NumberedRows]",
        progress: TaskProgress,
    ) -> Iterator[dict[str, Any]]:
        from ..adapters import without_wrapper
        from ..rows.text import tokenizer_of
        from .packed import Packed

        assert isinstance(progress, ScoreProgress), "it is one of new_progress"
        model = without_wrapper(model)
        runner = self.runner(model, tokenizer or tokenizer_of(model))
        return Packed(model, runner, progress).run(parts)
