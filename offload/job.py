"""A file of rows in, a file of results out: the scoring job behind the command line."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from .jsonl import ResultWriter, count_rows, read_rows
from .model import engine_of, load, unwrap
from .policy import Policy
from .progress import JobProgress
from .report import JobFigures, make_report, write_report
from .score import ScoreProgress, score
from .text import load_tokenizer


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """Score the rows of `source` with the checkpoint `model` into `output`."""

    model: Path
    source: Path
    output: Path
    policy: Policy
    report: Path | None = None
    window: int | None = None
    stride: int | None = None

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
                progress = self._write(model, tokenizer, writer, num_rows, console)
                writer.finish()
            engine = engine_of(model)
            first = engine.first_unit_at
            figures = JobFigures(
                rows=progress.rows_done,
                rows_failed=progress.rows_failed,
                tokens=progress.tokens_done,
                tokens_padding=progress.tokens_padding,
                micro_batches=progress.micro_batches_done,
                seconds=time.perf_counter() - loaded,
                load_seconds=loaded - start,
                seconds_to_first_unit=None if first is None else first - start,
            )
            report = make_report(
                str(self.model), self.policy, figures, engine.statistics()
            )
        finally:
            unwrap(model)
        if self.report is not None:
            write_report(self.report, report)
        return report

    def _write(
        self,
        model: Any,
        tokenizer: Any,
        writer: ResultWriter,
        num_rows: int,
        console: Console,
    ) -> ScoreProgress:
        progress = ScoreProgress()
        engine = engine_of(model)
        start = time.perf_counter()

        def poll() -> tuple[float, float, str]:
            done = progress.rows_done + progress.rows_in_flight * engine.pass_fraction
            rate = progress.tokens_done / (time.perf_counter() - start)
            remark = f"{progress.rows_done}/{num_rows} rows"
            return done, num_rows, f"{remark}, {rate:,.0f} tokens/s" if rate else remark

        results = score(
            model,
            read_rows(self.source),
            tokenizer=tokenizer,
            window=self.window,
            stride=self.stride,
            progress=progress,
        )
        with JobProgress(console, "scoring", poll):
            for result in results:
                writer.write(result)
        return progress
