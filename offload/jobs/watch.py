"""Watches a job: shows how far it is, writes its metrics, and keeps the samples for the
pictures of its report."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ...io.closing import Closing
from ..monitoring.metrics import MetricsFile
from ..monitoring.monitor import Every, Listener, Monitor
from ..monitoring.progress import (
    JSON_SECONDS,
    PLAIN_SECONDS,
    JobBar,
    JsonLines,
    PlainLines,
)
from ..monitoring.samples import ResourceSample, Samples
from ..monitoring.time_left import TimeLeft
from .look import ProgressSnapshot, resident_bytes

_METRICS_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Watching:
    """Where progress is written to, besides the terminal."""

    log_json: bool = False
    """One JSON object every few seconds on the console, instead of lines."""
    metrics: Path | None = None
    """A Prometheus text file, written every few seconds."""


class Watch(Closing):
    """Watches a job until closed. All threads of the job may call it; it looks at the
    model only inside `computing`."""

    def __init__(
        self,
        console: Console,
        title: str,
        labels: dict[str, str],
        watching: Watching,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.samples = Samples()
        self.is_quiet = console.quiet
        self.began = clock()
        self._clock = clock
        self._title = title
        self._stage = "loading"
        self._stage_began = self.began
        self._num_rows: Callable[[], float | None] = lambda: None
        self._rows_before = 0
        self._look_at_model: Callable[[], ProgressSnapshot] | None = None
        self._pace = TimeLeft()
        self._opened = ExitStack()
        listeners: list[Listener] = [lambda window: self.samples.add(window.now)]
        listeners.append(self._shown(console, watching))
        if watching.metrics is not None:
            metrics = MetricsFile(watching.metrics, labels)
            listeners.append(Every(_METRICS_SECONDS, metrics, is_eager=True))
        self._monitor = self._opened.enter_context(Monitor(self._look, listeners))
        self._monitor.tick()  # what cannot be written fails before rows are computed
        self._monitor.start()

    @property
    def failures(self) -> tuple[str, ...]:
        """What could not be shown or written, each said once."""
        return tuple(self._monitor.failures)

    @contextmanager
    def computing(
        self,
        look: Callable[[], ProgressSnapshot],
        num_rows: Callable[[], float | None],
        rows_before: int = 0,
    ) -> Iterator[None]:
        """The block computes rows. `look` gives a snapshot of the model and may be
        called by any thread; `num_rows()` estimates the rows of the input;
        `rows_before` of them were done before."""
        self._num_rows, self._rows_before = num_rows, rows_before
        self._look_at_model = look
        self._stage, self._stage_began = self._title, self._clock()
        try:
            yield
        finally:
            self._monitor.close()  # so that nobody looks at a model that is closing
            self._look_at_model = None

    def close(self) -> None:
        self._opened.close()

    def _shown(self, console: Console, watching: Watching) -> Listener:
        if watching.log_json:
            return Every(JSON_SECONDS, JsonLines(console), is_eager=True)
        if console.is_terminal:
            return self._opened.enter_context(JobBar(console))
        return Every(PLAIN_SECONDS, PlainLines(console))

    def _look(self) -> ResourceSample:
        now, look_at_model = self._clock(), self._look_at_model
        seconds, of_stage = now - self.began, now - self._stage_began
        if look_at_model is None:
            return ResourceSample(
                seconds=seconds,
                stage=self._stage,
                stage_seconds=of_stage,
                bytes_read={},
                resident_bytes=resident_bytes(),
            )
        look = look_at_model()
        num_rows = self._num_rows()
        sample = ResourceSample(
            seconds=seconds,
            stage=self._stage,
            stage_seconds=of_stage,
            rows=self._rows_before + look.rows,
            rows_before=self._rows_before,
            num_rows=None if num_rows is None else round(num_rows),
            tokens=look.tokens,
            tokens_through=look.tokens_through,
            passes=look.passes,
            wait_seconds=look.wait_seconds,
            compute_seconds=look.compute_seconds,
            bytes_read=look.bytes_read,
            num_ranks=look.num_ranks,
            rank_wait_seconds=look.rank_wait_seconds,
            rank_bytes_sent=look.rank_bytes_sent,
            resident_bytes=look.resident_bytes,
            device_bytes=look.device_bytes,
        )
        return self._pace.follow(sample)
