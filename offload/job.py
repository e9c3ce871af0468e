"""A file of rows in, a file of results out: the job behind the command line."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from .jsonl import ResultWriter, count_rows, read_rows
from .model import engine_of, load, unwrap
from .policy import Policy
from .prediction import predicted
from .progress import JobProgress
from .report import JobFigures, make_report, write_report
from .text import load_tokenizer
from .work import Work


@dataclass(frozen=True, slots=True)
class Job:
    """Do `work` with the rows of `source` and the checkpoint `model` into `output`."""

    work: Work
    model: Path
    source: Path
    output: Path
    policy: Policy
    report: Path | None = None

    def run(self, console: Console) -> dict[str, Any]:
        """Runs the job and returns its report. Raises PenstockError; what was written
        until then stays in `output` + ".partial"."""
        num_rows = count_rows(self.source)
        start = time.perf_counter()
        model = load(self.model, self.policy)
        try:
            tokenizer = load_tokenizer(self.model)
            loaded = time.perf_counter()
            with ResultWriter(self.output) as writer:
                self._write(model, tokenizer, writer, num_rows, console)
                writer.finish()
            seconds = time.perf_counter() - loaded
            engine, progress = engine_of(model), self.work.progress
            first, counts = engine.first_unit_at, progress.figures(seconds)
            figures = JobFigures(
                rows=progress.rows_done,
                rows_failed=progress.rows_failed,
                seconds=seconds,
                load_seconds=loaded - start,
                seconds_to_first_unit=None if first is None else first - start,
                counts=counts,
                plan={
                    **self.work.plan(self.policy, counts["micro_batches"]),
                    **self._predicted(model, counts),
                },
            )
            report = make_report(
                str(self.model), self.policy, figures, engine.statistics()
            )
        finally:
            unwrap(model)
        if self.report is not None:
            write_report(self.report, report)
        return report

    def _predicted(self, model: Any, counts: dict[str, Any]) -> dict[str, Any]:
        done = self.work.progress.rows_done - self.work.progress.rows_failed
        return predicted(
            model, engine_of(model).arrangement, self.policy, {**counts, "rows": done}
        )

    def _write(
        self,
        model: Any,
        tokenizer: Any,
        writer: ResultWriter,
        num_rows: int,
        console: Console,
    ) -> None:
        progress, engine = self.work.progress, engine_of(model)
        start = time.perf_counter()

        def poll() -> tuple[float, float, str]:
            done = progress.rows_through(engine.pass_fraction)
            remark = progress.remark(time.perf_counter() - start)
            return done, num_rows, f"{progress.rows_done}/{num_rows} rows, {remark}"

        rows = read_rows(self.source, self.work.row_keys)
        with JobProgress(console, self.work.title, poll):
            for result in self.work.results(model, tokenizer, rows):
                writer.write(result)
