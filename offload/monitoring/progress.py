"""Shows how far a job is: as a bar on a terminal, as lines of text, or as lines of
JSON."""

import json
import threading
import time
from dataclasses import asdict
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from ...io.closing import Closing
from .samples import ResourceSample, Window
from .show import human_rate, human_seconds

PLAIN_SECONDS = 30.0
JSON_SECONDS = 5.0
_WAITING_BINDS = 0.1


def speeds_of(window: Window) -> str:
    """The speeds of the last seconds: "318 tokens/s, disk 1.21 GB/s, bound by disk
    (waiting 41%)"."""
    found = [f"{window.now.tokens_per_second:,.1f} tokens/s"]
    rates = window.bytes_per_second
    found += [f"{tier} {human_rate(rate)}" for tier, rate in rates.items() if rate]
    if window.waiting > _WAITING_BINDS:
        tier = max(rates, key=lambda name: rates[name], default="disk")
        found.append(f"bound by {tier} (waiting {window.waiting:.0%})")
    elif window.now.passes:  # a site may take longer than the window
        found.append("bound by compute")
    return ", ".join(found)


def rows_of(sample: ResourceSample) -> str:
    """The rows that are done: "12/72 rows"."""
    of = "" if sample.num_rows is None else f"/{sample.num_rows:,}"
    return f"{int(sample.rows):,}{of} rows"


def time_left(sample: ResourceSample) -> str:
    """The time left: "1:36"; or why it is not known."""
    if sample.seconds_left is not None:
        return human_seconds(sample.seconds_left)
    return "first pass" if sample.is_first_pass else "?"


def _left(sample: ResourceSample) -> str:
    left = time_left(sample)
    return f"{left} left" if sample.seconds_left is not None else left


class JobBar(Closing):
    """Shows a line for each stage of a job: finished stages stay, the current one
    moves.

    Shows nothing while the model is loaded: tiers that take long to fill show their own
    bar.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = _bar(console, "ETA {task.fields[left]}")
        self._task: TaskID | None = None
        self._stage = ""

    def __call__(self, window: Window) -> None:
        now = window.now
        if now.stage == "loading":
            return
        if self._task is None:
            began = now.seconds - now.stage_seconds
            self._console.print(f"[green]✓[/] loading  {human_seconds(began)}")
            self._task = self._bar.add_task(now.stage, total=None, remark="", left="?")
            self._bar.start()
        self._bar.update(
            self._task,
            completed=now.rows,
            total=now.num_rows,
            remark=f"{rows_of(now)}, {speeds_of(window)}",
            left=time_left(now),
        )

    def close(self) -> None:
        self._bar.stop()


class PlainLines:
    """Prints a line of text, for a log file."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, window: Window) -> None:
        now = window.now
        parts = [f"penstock: {now.stage} for {human_seconds(now.stage_seconds)}"]
        if now.stage != "loading":
            parts += [rows_of(now), speeds_of(window), _left(now)]
        self._console.out(", ".join(parts), highlight=False)


class JsonLines:
    """Prints a JSON object per line, for a program: counters since the job began, and
    speeds of the last seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, window: Window) -> None:
        now = window.now
        found = asdict(now) | {
            "bytes_read": dict(now.bytes_read),
            "bytes_per_second": window.bytes_per_second,
            "waiting": window.waiting,
            "tokens_per_second": now.tokens_per_second,
        }
        self._console.out(json.dumps(found), highlight=False)


class FillProgress:
    """Shows a bar on a terminal if filling takes longer than two seconds.

    Call it with the bytes that are done and the total. The `with` block closes it.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar: Progress | None = None
        self._lock = threading.Lock()  # all threads that fill call this
        self._start = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._start <= 2:
            return
        remark = f"{done / 1e9:.1f} of {total / 1e9:.1f} GB"
        with self._lock:
            if self._bar is None:
                self._bar = _bar(Console(stderr=True), "")
                self._task = self._bar.add_task(self._title, total=None, remark="")
                self._bar.start()
            self._bar.update(self._task, completed=done, total=total, remark=remark)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def search_bar(console: Console) -> Progress:
    """A progress bar for tasks with the fields `remark` and `left` (the time left)."""
    return _bar(console, "ETA {task.fields[left]}")


def _bar(console: Console, left: str) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[remark]}"),
        TimeElapsedColumn(),
        TextColumn(left),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
