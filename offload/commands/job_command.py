"""What the commands that do something with rows have in common: files in and out, how
the model is streamed, and who is told."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..startup import rare_collections
from .options import (
    OUTPUTS,
    SOURCES,
    Adapter,
    LogJson,
    Metrics,
    Model,
    PolicyFile,
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

if TYPE_CHECKING:
    from ..jobs.job import Job
    from ..jobs.work import Work

ROWS_WITH_ERRORS = 1
INTERRUPTED = 130


def job_command(
    rows: str, results: str
) -> Callable[[Callable[..., "Work"]], Callable[..., None]]:
    """Makes a command of a function that takes the options of its own and returns what
    is to be done. `rows` and `results` say what those look like, for `--help`."""
    source = typer.Argument(metavar="INPUT", help=f"A row is {rows}. {SOURCES}")
    output = typer.Option(
        "--output",
        "-o",
        help=f'{results} or {{"id", "error"}} for each row, in the input\'s order. '
        + OUTPUTS,
    )

    def command(
        work_of: Callable[..., "Work"],
        model: Model,
        source: Annotated[list[str], source],
        output: Annotated[Path, output],
        policy: PolicyFile = None,
        settings: Settings = None,
        adapter: Adapter = None,
        report: Report = None,
        log_json: LogJson = False,
        metrics: Metrics = None,
        restart: Restart = False,
        retry_errors: RetryErrors = False,
        workers: Workers = 1,
        trust_remote_code: TrustRemoteCode = False,
        **own: Any,
    ) -> None:
        with rare_collections():
            from ..jobs.job import Job
            from ..jobs.watch import Watching

        chosen = policy_of(policy, settings, trust_remote_code, adapter)
        mode = mode_of(restart, retry_errors)
        watching = Watching(log_json, metrics)
        work = work_of(**own)
        run(Job(work, model, source, output, chosen, report, mode, watching, workers))

    return lambda work_of: _with_options_of(work_of, command)


def _with_options_of(
    work_of: Callable[..., "Work"], command: Callable[..., None]
) -> Callable[..., None]:
    """`command` for this work, by its name: typer reads the options of both off the
    signature."""

    def bound(**options: Any) -> None:
        command(work_of, **options)

    _, *common, _ = inspect.signature(command).parameters.values()
    own = inspect.signature(work_of).parameters.values()
    parameters = [
        each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*common, *own)
    ]
    bound.__name__, bound.__doc__ = work_of.__name__, work_of.__doc__
    bound.__annotations__ = {each.name: each.annotation for each in parameters}
    bound.__dict__["__signature__"] = inspect.Signature(parameters)
    return bound


def run(job: "Job") -> None:
    """Runs a job and says what became of it. The exit code is the job's."""
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
