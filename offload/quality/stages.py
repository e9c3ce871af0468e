"""Shows on standard error how far a comparison is."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from ...io.errors import readable

T = TypeVar("T")


class Stages:
    """Prints what is done: a bar on a terminal, a line for each stage elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        """Prints a line."""
        self._console.out(f"penstock: {readable(text)}", highlight=False)

    def each(
        self, values: Iterator[T] | Iterable[T], stage: str, total: int | None
    ) -> Iterator[T]:
        """Yields `values`, of which there are `total` (None: it is not known)."""
        if not self._console.is_terminal:
            self.say(stage)
            yield from values
            return
        bar = track(values, stage, total=total, console=self._console, transient=True)
        yield from bar
