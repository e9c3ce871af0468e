"""Makes a command of a task: the options that all jobs have and those of the task, and
what is printed at the end."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..startup import rare_collections
from ..tasks.task import Task
from .options import (
    OUTPUTS,
    SOURCES,
    Adapter,
    Device,
    Dtype,
    LogJson,
    Metrics,
    Model,
    PolicyFile,
    Ranks,
    Report,
    Restart,
    RetryErrors,
    Settings,
    TrustRemoteCode,
    Workers,
    mode_of,
    policy_of,
    say,
)
from .task_options import parameters_of, task_from

if TYPE_CHECKING:
    from ..jobs.job import Job

ROWS_WITH_ERRORS = 1
INTERRUPTED = 130


def job_command(task: type[Task]) -> Callable[..., None]:
    """The command of `task`, as typer takes it: first the options that all jobs have,
    then those of the task."""
    source = typer.Argument(
        metavar="INPUT", help=f"A row is {task.row_help}. {SOURCES}"
    )
    output = typer.Option(
        "--output",
        "-o",
        help=f'{task.result_help} or {{"id", "error"}} for each row, in the input\'s '
        f"order. {OUTPUTS}",
    )

    def command(
        model: Model,
        source: Annotated[list[str], source],
        output: Annotated[Path, output],
        policy: PolicyFile = None,
        settings: Settings = None,
        device: Device = None,
        dtype: Dtype = None,
        adapter: Adapter = None,
        report: Report = None,
        log_json: LogJson = False,
        metrics: Metrics = None,
        restart: Restart = False,
        retry_errors: RetryErrors = False,
        workers: Workers = 1,
        ranks: Ranks = 1,
        trust_remote_code: TrustRemoteCode = False,
        **own: Any,
    ) -> None:
        with rare_collections():
            from ..jobs.job import Job
            from ..jobs.ranked import OtherRanks, joined_ranks, num_started
            from ..jobs.sharing import check_ranks
            from ..jobs.watch import Watching

        own_values = {"device": device, "dtype": dtype}
        chosen = policy_of(policy, settings, trust_remote_code, adapter, **own_values)
        mode = mode_of(restart, retry_errors)
        watching = Watching(log_json, metrics)
        asked = task_from(task, own)
        check_ranks(ranks, workers, num_started())
        if chosen.ranks == "gather" and max(ranks, num_started()) > 1:
            ranks, workers = 1, max(ranks, num_started())  # each has rows of its own
        others = OtherRanks(ranks) if ranks > 1 else joined_ranks(asked, model, chosen)
        if others is None:
            return  # another process reads, writes and reports
        job = Job(asked, model, source, output, chosen, report, mode, watching, workers)
        with others:
            run(replace(job, others=others))

    *common, _ = inspect.signature(command).parameters.values()
    return _with_signature(command, task, [*common, *parameters_of(task)])


def _with_signature(
    command: Callable[..., None],
    task: type[Task],
    parameters: Sequence[inspect.Parameter],
) -> Callable[..., None]:
    """`command` with the name, the help and the parameters of the command of `task`.
    typer reads the options off the signature."""

    def bound(**options: Any) -> None:
        command(**options)

    parameters = [
        each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters
    ]
    bound.__name__, bound.__doc__ = task.name, task.__doc__
    bound.__annotations__ = {each.name: each.annotation for each in parameters}
    bound.__dict__["__signature__"] = inspect.Signature(parameters)
    return bound


def run(job: "Job") -> None:
    """Runs a job and prints how it ended. The process's exit code says so, too."""
    from ..monitoring.show import report_table

    console = Console(stderr=True)
    try:
        done = job.run(console)
    except KeyboardInterrupt:
        say("interrupted: run the same command again to go on")
        raise typer.Exit(INTERRUPTED) from None
    if done.report is None:
        say(
            f"{job.output} is done already: {done.num_rows:,} rows; --restart does all "
            "again, --retry-errors those that failed"
        )
    elif console.is_terminal:
        console.print(report_table(done.report, f"{job.output}"))
        if job.report is not None:
            say(f"pictures of where the time went: {job.report / 'report.html'}")
    if done.num_errors:
        say(f"{done.num_errors} of {done.num_rows} rows failed: {job.output}")
        raise typer.Exit(ROWS_WITH_ERRORS)
