"""A file of rows in, a file of results out: the job behind the command line."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from .jsonl import ResultWriter, count_rows, read_rows
from .model import engine_of, load, unwrap
from .policy import Policy
from .recorded import Recorded
from .report import JobFigures, judge, make_report, write_report
from .text import load_tokenizer
from .watch import Watch, Watching
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
    watching: Watching = field(default_factory=Watching)

    def run(self, console: Console) -> dict[str, Any]:
        """Runs the job and returns its report. Raises PenstockError; what was written
        until then stays in `output` + ".partial"."""
        num_rows = count_rows(self.source)
        labels = {"model": str(self.model), "output": str(self.output)}
        with Watch(console, self.work, labels, self.watching) as watch:
            return self._run(watch, num_rows)

    def _run(self, watch: Watch, num_rows: int) -> dict[str, Any]:
        model = load(self.model, self.policy)
        try:
            tokenizer, engine = load_tokenizer(self.model), engine_of(model)
            loaded = time.perf_counter()
            with (
                ResultWriter(self.output) as writer,
                watch.computing(engine, num_rows),
            ):
                rows = read_rows(self.source, self.work.row_keys)
                for result in self.work.results(model, tokenizer, rows):
                    writer.write(result)
                writer.finish()
            seconds = time.perf_counter() - loaded
            progress, first = self.work.progress, engine.first_unit_at
            counts = progress.figures(seconds)
            figures = JobFigures(
                rows=progress.rows_done,
                rows_failed=progress.rows_failed,
                seconds=seconds,
                load_seconds=loaded - watch.began,
                seconds_to_first_unit=None if first is None else first - watch.began,
                counts=counts,
                plan=self.work.plan(self.policy, counts["micro_batches"]),
                dtype=watch.dtype,
            )
            recorded = Recorded(
                watch.began, engine.timeline.spans(), watch.samples.all()
            )
            statistics = engine.statistics()
            bound = judge(self.policy, figures, statistics, recorded.spans)
            report = make_report(
                str(self.model), self.policy, figures, statistics, bound, recorded
            )
        finally:
            unwrap(model)
        report["fallbacks"] += watch.failures
        if self.report is not None:
            write_report(self.report, report, recorded)
        return report
