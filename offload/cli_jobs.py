"""The commands that do something with rows: `penstock score`, `penstock generate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from .options import (
    OUTPUTS,
    SOURCES,
    LogJson,
    Metrics,
    Model,
    PolicyFile,
    Report,
    Restart,
    RetryErrors,
    Settings,
    Workers,
    mode_of,
    policy_of,
    say,
)
from .values import parse_setting

if TYPE_CHECKING:
    from .job import Job

ROWS_WITH_ERRORS = 1
INTERRUPTED = 130


def score(
    model: Model,
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT",
            help='A row is {"id", "text"} or {"id", "prompt", "completion"}. '
            + SOURCES,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help='{"id", "logprob", "tokens", "perplexity"} or {"id", "error"} for '
            "each row, in the input's order. " + OUTPUTS,
        ),
    ],
    policy: PolicyFile = None,
    settings: Settings = None,
    report: Report = None,
    log_json: LogJson = False,
    metrics: Metrics = None,
    restart: Restart = False,
    retry_errors: RetryErrors = False,
    workers: Workers = 1,
    window: Annotated[
        int | None,
        typer.Option(
            help="Score texts longer than the model's context in windows of so many "
            "tokens. Without it such a row is an error."
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens by which windows advance (default: half a window)."),
    ] = None,
) -> None:
    """Log-probability of each text (or completion) under a causal language model.

    Example: `penstock score ./llama-3b texts.jsonl -o scores.jsonl --set
    device_memory=1GiB --report out/`
    """
    from .job import Job
    from .watch import Watching
    from .work import ScoreWork

    work = ScoreWork(window, stride)
    chosen = policy_of(policy, settings)
    mode = mode_of(restart, retry_errors)
    watching = Watching(log_json, metrics)
    job = Job(work, model, source, output, chosen, report, mode, watching, workers)
    run(job)


def generate(
    model: Model,
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT",
            help='A row is {"id", "prompt"} or {"id", "messages"}. ' + SOURCES,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help='{"id", "completion", "tokens", "finish_reason"} or {"id", "error"} '
            "for each row, in the input's order. " + OUTPUTS,
        ),
    ],
    max_new_tokens: Annotated[
        int, typer.Option(help="Most tokens that a completion may have.")
    ],
    policy: PolicyFile = None,
    settings: Settings = None,
    report: Report = None,
    log_json: LogJson = False,
    metrics: Metrics = None,
    restart: Restart = False,
    retry_errors: RetryErrors = False,
    workers: Workers = 1,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="A completion ends before this text. Repeatable."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Sample at this temperature; 0: take the likeliest. Without it, as "
            "the model's generation_config.json says."
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(help="Of what is sampled; each row has its own random state."),
    ] = 0,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            metavar="KEY=VALUE",
            help="Any other option of transformers' generate, such as top_p=0.9, "
            "repetition_penalty=1.1 or num_beams=4. Repeatable.",
        ),
    ] = None,
) -> None:
    """Completes each prompt (or chat) with a language model.

    Example: `penstock generate ./llama-3b prompts.jsonl -o completions.jsonl
    --max-new-tokens 64 --set device_memory=1GiB --set sequences_in_flight=256`
    """
    from .job import Job
    from .watch import Watching
    from .work import GenerateWork

    values = dict(map(parse_setting, options or []))
    if temperature is not None:
        values["temperature"] = temperature
    work = GenerateWork(max_new_tokens, tuple(stop or ()), seed, values)
    chosen = policy_of(policy, settings)
    mode = mode_of(restart, retry_errors)
    watching = Watching(log_json, metrics)
    job = Job(work, model, source, output, chosen, report, mode, watching, workers)
    run(job)


def run(job: "Job") -> None:
    """Runs a job and says what became of it. The exit code is the job's."""
    from .show import report_table

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
