"""Files of rows in, a file of results out: the job behind the command line."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ...io.errors import InputError, RanksError, UsageError
from ..files.inputs import Inputs
from ..files.outputs import destination
from ..files.part_reader import check_done, read_parts
from ..files.parts import OutputPart
from ..files.sources import Own, check_apart, find_files
from ..files.streamed_output import StreamedOutput, is_stream
from ..monitoring.host_load import CpuTimes, taken_elsewhere
from ..plans.planned import Workload
from ..policy import Policy
from ..reports.advice import with_tried_advice
from ..reports.recorded import Recorded
from ..reports.report import JobFigures, judge, make_report, write_report
from ..tasks.task import Task
from .ahead import Ahead
from .budgets import threads_of
from .choosing import OLDER, Chosen, choose, kept_of, mean_length, restored, say_chosen
from .computed import WorkerResult
from .identity import identify
from .kept import Mode, ResumableOutput, begun_as
from .rank_records import record_of
from .ranked import OtherRanks, lead
from .running import Output, PartsRun
from .sharing import Sharing, check_workers
from .stopping import stopping
from .watch import Watch, Watching

_PARTS_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Done:
    """How a job ended."""

    num_rows: int
    """The rows of its output."""
    num_errors: int
    """How many of those rows are errors."""
    report: dict[str, Any] | None
    """The report; None where nothing was left to do."""


@dataclass(frozen=True, slots=True)
class Job:
    """Does `task` with the rows of `source` and the checkpoint `model`, into `output`.

    `source` is a path, a glob, a folder, `-` (standard input), or several of them;
    `output` is a file, or `-` (standard output). Finished parts are kept beside the
    output until all are done: a job that was killed goes on when it is run again. On
    the main thread it handles SIGINT and SIGTERM while it runs.
    """

    task: Task
    model: Path
    source: str | Path | Sequence[str | Path]
    output: Path
    policy: Policy
    report: Path | None = None
    mode: Mode = "resume"
    watching: Watching = field(default_factory=Watching)
    workers: int = 1
    """The number of processes that share the job, each with a model of its own."""
    others: OtherRanks = field(default_factory=OtherRanks)
    """The ranks that share the model with this process."""
    chosen: Chosen | None = field(default=None, kw_only=True)
    """The policy that it runs with, once that is chosen."""

    def run(self, console: Console) -> Done:
        """Runs the job. Raises PenstockError; StoppedError after a signal: once the
        parts under way are done, or at once after a second signal."""
        check_workers(self.workers)
        source, output = self.source, self.output
        if not is_stream(output):
            output = destination(output, self.model)
        files = find_files(
            [source] if isinstance(source, (str, Path)) else source,
            Own(output, self.report),
        )
        inputs = Inputs(files, self.task.row_keys)
        if is_stream(output):
            if self.mode == "retry":
                raise UsageError(
                    f"nothing is kept of {self.output}: failed rows can only be done "
                    "again in a file"
                )
            chosen = self._choose(self.policy, inputs)
            cut = self.task.cut(chosen.policy)
            with StreamedOutput(output, cut) as streamed:
                return replace(self, chosen=chosen)._run(inputs, streamed, console)
        check_apart(output, files)
        chosen = self._begun_with(output) or self._choose(self.policy, inputs)
        sharing = self.others.num_beside(self.workers)
        manifest = identify(
            inputs,
            self.model,
            chosen.policy,
            self.task.identity(),
            self.task.cut(chosen.policy),
            num_threads=threads_of(torch.get_num_threads(), sharing),
            chosen=kept_of(self.policy, chosen.policy),
        )
        with ResumableOutput(output, manifest, self.mode) as kept:
            if kept.is_finished:
                if kept.is_input_doubtful:
                    check_done(inputs, kept.cut, kept.done)
                return Done(kept.num_rows, kept.num_errors, None)
            if chosen.plan is None and kept.manifest.chosen is not None:
                # Only memory is still open.
                found = self._choose(chosen.policy, inputs)
                chosen = replace(found, is_begun=True)
            return replace(self, chosen=chosen)._run(inputs, kept, console)

    def _begun_with(self, output: Path) -> Chosen | None:
        """The values that the job was begun with; None where it begins now."""
        begun = begun_as(output, self.mode)
        if begun is None:
            return None
        return Chosen(restored(self.policy, begun.chosen or {}), note=OLDER)

    def _choose(self, asked: Policy, inputs: Inputs) -> Chosen:
        workload = Workload(self.task, mean_length(inputs, self.task.row_keys))
        num, ranks = self.workers, self.others.group
        return choose(self.model, asked, workload, num=num, ranks=ranks)

    @property
    def _settled(self) -> Chosen:
        assert self.chosen is not None, "it is chosen before rows are read"
        return self.chosen

    def _run(self, inputs: Inputs, output: Output, console: Console) -> Done:
        """Computes the parts that are not done, then finishes the output."""
        parts = read_parts(
            inputs,
            output.cut,
            dict(output.done),
            output.redo,
            is_checked=output.is_input_doubtful,
        )
        report = recorded = None
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
                say_chosen(self._settled, console, as_json=self.watching.log_json)
                labels = {"model": str(self.model), "output": str(self.output)}
                with Watch(console, self.task.title, labels, self.watching) as watch:
                    report, recorded = self._compute(
                        chain([first], ahead), ahead, inputs, output, before, watch
                    )
                report["fallbacks"] += watch.failures
                report["rows_before"] = before
                report["rows_failed_before"] = failed_before
            elif not output.done:
                raise InputError(
                    f"{', '.join(file.name for file in inputs.files)} is empty: it "
                    'needs a JSON object a line, such as {"text": "..."}'
                )
        output.finish()
        if report is not None and recorded is not None and self.report is not None:
            write_report(self.report, report, recorded)
        return Done(output.num_rows, output.num_errors, report)

    def _compute(
        self,
        parts: Iterable[OutputPart],
        ahead: Ahead[OutputPart],
        inputs: Inputs,
        output: Output,
        before: int,
        watch: Watch,
    ) -> tuple[dict[str, Any], Recorded]:
        """Computes `parts` in this process. Returns the report, and what its pictures
        are made of."""
        if self.workers > 1:
            return self._share(parts, ahead, inputs, output, before, watch)
        progress, others = self.task.new_progress(), self.others
        policy, lost = self._settled.policy, None
        with others, others.load(self.task, self.model, policy) as loaded:
            began, cpu = time.perf_counter(), CpuTimes.now()
            look = partial(loaded.look, progress)
            with watch.computing(look, inputs.estimated_rows, before):
                with (
                    stopping(ahead, output, is_quiet=watch.is_quiet),
                    PartsRun(parts, output) as run,
                ):
                    model, tokenizer = loaded.model, loaded.tokenizer
                    led = lead(loaded.engine, run.feed())
                    try:
                        run.take_all(self.task.results(model, tokenizer, led, progress))
                    except RanksError as error:
                        lost = error  # there is a report of what was done before
                if run.failure is not None:
                    raise run.failure
            seconds = time.perf_counter() - began
            taken = taken_elsewhere(cpu, CpuTimes.now(), torch.get_num_threads())
            counts = progress.figures(seconds)
            counts["rows"] = progress.rows_done - progress.rows_failed
            forecast = self._settled.predicted(self.task, loaded, counts)
            computed = replace(loaded.computed(progress), others=others.records())
            made = self._report(computed, seconds, began, watch, forecast, taken)
            if lost is not None:
                made[0]["fallbacks"].append(f"the job has ended early: {lost}")
                if self.report is not None:
                    write_report(self.report, *made)
                raise lost
            return made

    def _share(
        self,
        parts: Iterable[OutputPart],
        ahead: Ahead[OutputPart],
        inputs: Inputs,
        output: Output,
        before: int,
        watch: Watch,
    ) -> tuple[dict[str, Any], Recorded]:
        """Computes `parts` in several processes; else like `_compute`."""
        sharing = Sharing(
            self.workers,
            self.task,
            self.model,
            self._settled.policy,
            parts,
            ahead,
            output,
            self.others.remote,
        )
        with stopping(ahead, output, is_quiet=watch.is_quiet), sharing:
            sharing.pool.start()
            began = time.perf_counter()
            with watch.computing(sharing.look, inputs.estimated_rows, before):
                sharing.pool.finish()
        if sharing.pool.failure is not None:
            raise sharing.pool.failure
        seconds = time.perf_counter() - began
        note = f"{self.workers} workers share the machine: nothing is predicted"
        report, recorded = self._report(
            sharing.computed(), seconds, began, watch, {"note": note}
        )
        report["workers"] = {"num": self.workers, "notes": list(sharing.notes)}
        return report, recorded

    def _report(
        self,
        computed: WorkerResult,
        seconds: float,
        began: float,
        watch: Watch,
        forecast: Mapping[str, Any],
        taken: float = 0.0,
    ) -> tuple[dict[str, Any], Recorded]:
        """The report of rows that took `seconds`, from `began` on
        (`time.perf_counter`)."""
        progress, first = computed.progress, computed.first_unit_at
        counts = progress.figures(seconds)
        policy, words = self._settled.policy, self._settled.words
        promised = self.task.promised(policy, counts["micro_batches"])
        figures = JobFigures(
            rows=progress.rows_done,
            rows_failed=progress.rows_failed,
            seconds=seconds,
            load_seconds=began - watch.began,
            seconds_to_first_unit=None if first is None else first - watch.began,
            counts=counts,
            plan={**promised, **forecast, "chosen": words},
            dtype=computed.dtype,
            taken_elsewhere=taken,
        )
        samples, others = watch.samples.all(), computed.others
        recorded = Recorded(watch.began, computed.spans, samples, others)
        statistics = computed.statistics
        bound = judge(policy, figures, statistics, recorded)
        bound = with_tried_advice(bound, self._settled.trial(self.model, self.policy))
        report = make_report(
            str(self.model), self.policy, policy, figures, statistics, bound, recorded
        )
        if others or statistics.ranks.num_ranks > 1:
            ranks = [record_of(computed, 0), *others]
            report["per_rank"] = [each.figures() for each in ranks]
        return report, recorded
