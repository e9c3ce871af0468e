"""A progress bar with an ETA on a terminal; nothing at all elsewhere."""

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_SECONDS = 0.25


class JobProgress:
    """Shows how far a job is, asked of `poll` (done, total, remark) four times a
    second by a thread of its own; ends with the `with` block."""

    def __init__(
        self,
        console: Console,
        title: str,
        poll: Callable[[], tuple[float, float | None, str]],
    ) -> None:
        self._poll = poll
        self._title = title
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[remark]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        if not self._bar.disable:
            self._task = self._bar.add_task(self._title, total=None, remark="")
            self._bar.start()
            self._thread = threading.Thread(
                target=self._watch, name="penstock-progress", daemon=True
            )
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            self._bar.stop()

    def _watch(self) -> None:
        while not self._done.wait(_SECONDS):
            done, total, remark = self._poll()
            self._bar.update(self._task, completed=done, total=total, remark=remark)


class FillProgress:
    """Called with (done, total) bytes, shows a bar on a terminal once it takes longer
    than two seconds. Closed by `with`."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._state = (0, 0)
        self._bar: JobProgress | None = None
        self._start = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        self._state = (done, total)
        if self._bar is None and time.monotonic() - self._start > 2:
            self._bar = JobProgress(Console(stderr=True), self._title, self._poll)
            self._bar.__enter__()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.__exit__(kind, error, traceback)

    def _poll(self) -> tuple[float, float, str]:
        done, total = self._state
        return done, total, f"{done / 1e9:.1f} of {total / 1e9:.1f} GB"
