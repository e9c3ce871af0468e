"""Files of rows in, a file of results out: the job behind the command line."""

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from ..io.errors import InputError, StoppedError, UsageError
from .ahead import Ahead
from .engine import Engine
from .identity import identify
from .inputs import Inputs
from .kept import KeptOutput, Mode
from .model import engine_of, load, unwrap
from .part_reader import check_done, read_parts
from .parts import NumberedRows, Part
from .policy import Policy
from .progress import JobProgress
from .report import JobFigures, make_report, write_report
from .running import Output, PartsRun
from .sources import check_apart, find_files
from .stopping import Stopping
from .streamed import StreamedOutput, is_stream
from .text import load_tokenizer
from .work import Work

_PARTS_AHEAD = 2
_STDERR = 2
_STOPPING = b"penstock: finishing what is under way; once more: stop at once\n"


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a job."""

    num_rows: int
    """Of its output."""
    num_errors: int
    """Of those, failed ones."""
    report: dict[str, Any] | None
    """None where all was done before."""


@dataclass(frozen=True, slots=True)
class Job:
    """Do `work` with the rows of `source` and the checkpoint `model` into `output`.

    `source` is a path, a glob, a folder, `-` (standard input), or several of them;
    `output` a file, or `-`. What is done is kept beside it until all is: killed at any
    time and run again, the job goes on. Its signals are taken over while it runs on the
    main thread.
    """

    work: Work
    model: Path
    source: str | Path | Sequence[str | Path]
    output: Path
    policy: Policy
    report: Path | None = None
    mode: Mode = "resume"

    def run(self, console: Console) -> Done:
        """Runs the job. Raises PenstockError; StoppedError when a signal came, once
        the parts under way are done, and at once when a second one came."""
        source = self.source
        files = find_files([source] if isinstance(source, (str, Path)) else source)
        inputs = Inputs(files, self.work.row_keys)
        cut = self.work.cut(self.policy)
        if is_stream(self.output):
            if self.mode == "retry":
                raise UsageError(
                    f"nothing is kept of {self.output}: failed rows can only be done "
                    "again in a file"
                )
            with StreamedOutput(self.output, cut) as streamed:
                return self._run(inputs, streamed, console)
        check_apart(self.output, files)
        task = self.work.task()
        manifest = identify(inputs, self.model, self.policy, task, cut)
        with KeptOutput(self.output, manifest, self.mode) as kept:
            if kept.is_finished:
                if kept.is_input_doubtful:
                    check_done(inputs, kept.cut, kept.done)
                return Done(kept.num_rows, kept.num_errors, None)
            return self._run(inputs, kept, console)

    def _run(self, inputs: Inputs, output: Output, console: Console) -> Done:
        """The parts that are not done; then they are joined."""
        parts = read_parts(
            inputs,
            output.cut,
            dict(output.done),
            output.redo,
            is_checked=output.is_input_doubtful,
        )
        report = None
        retried = sum(output.done[number].num_errors for number in output.redo)
        before, failed_before = output.num_rows - retried, output.num_errors - retried
        ahead = Ahead(
            parts,
            num=_PARTS_AHEAD,
            name="penstock-input",
            close_seconds=1.0 if inputs.is_stream else None,
        )
        with ahead:
            first = next(ahead, None)
            if first is not None:
                report = self._compute(first, ahead, inputs, output, before, console)
                report["rows_before"] = before
                report["rows_failed_before"] = failed_before
            elif not output.done:
                raise InputError(
                    f"{', '.join(file.name for file in inputs.files)} is empty: it "
                    'needs a JSON object a line, such as {"text": "..."}'
                )
        output.finish()
        if report is not None and self.report is not None:
            write_report(self.report, report)
        return Done(output.num_rows, output.num_errors, report)

    def _compute(
        self,
        first: Part,
        ahead: Ahead[Part],
        inputs: Inputs,
        output: Output,
        before: int,
        console: Console,
    ) -> dict[str, Any]:
        """Does the parts and returns the report."""
        start = time.perf_counter()
        model = load(self.model, self.policy)
        try:
            tokenizer = load_tokenizer(self.model)
            loaded = time.perf_counter()
            poll = self._poll(engine_of(model), inputs, before)
            work = partial(self.work.results, model, tokenizer)
            with JobProgress(console, self.work.title, poll):
                _finish_parts(work, chain([first], ahead), ahead, output, console)
            seconds = time.perf_counter() - loaded
            engine, progress = engine_of(model), self.work.progress
            first_unit, counts = engine.first_unit_at, progress.figures(seconds)
            figures = JobFigures(
                rows=progress.rows_done,
                rows_failed=progress.rows_failed,
                seconds=seconds,
                load_seconds=loaded - start,
                seconds_to_first_unit=None
                if first_unit is None
                else first_unit - start,
                counts=counts,
                plan=self.work.plan(self.policy, counts["micro_batches"]),
            )
            return make_report(
                str(self.model), self.policy, figures, engine.statistics()
            )
        finally:
            unwrap(model)

    def _poll(
        self, engine: Engine, inputs: Inputs, before: int
    ) -> Callable[[], tuple[float, float | None, str]]:
        """Asks how far the job is, `before` rows of which were done before."""
        start, progress = time.perf_counter(), self.work.progress

        def poll() -> tuple[float, float | None, str]:
            total = inputs.estimated_rows()
            done = before + progress.rows_through(engine.pass_fraction)
            remark = progress.remark(time.perf_counter() - start)
            of = "" if total is None else f"/{total:,.0f}"
            return done, total, f"{before + progress.rows_done:,}{of} rows, {remark}"

        return poll


def _finish_parts(
    work: Callable[[Iterator[NumberedRows]], Iterator[Mapping[str, Any]]],
    parts: Iterable[Part],
    ahead: Ahead[Part],
    output: Output,
    console: Console,
) -> None:
    """Does the parts until they have come to their end, or a signal came."""

    def stop() -> None:
        ahead.stop()
        if not console.quiet:
            os.write(_STDERR, _STOPPING)  # safe in a signal handler

    with Stopping(stop) as stopping:
        try:
            with PartsRun(parts, output) as run:
                for result in work(run.feed()):
                    run.take(result)
                run.finish()
        except KeyboardInterrupt:
            raise _stopped(output, stopping) from None
    if stopping.signal is not None and not ahead.is_done:
        raise _stopped(output, stopping)
    if run.failure is not None:
        raise run.failure


def _stopped(output: Output, stopping: Stopping) -> StoppedError:
    how = "run the same command again to go on"
    if not output.is_kept:
        how = "what went to standard output cannot be gone on with"
    return StoppedError(
        f"stopped: {output.num_rows:,} rows are done; {how}",
        stopping.signal or signal.SIGINT,
    )
