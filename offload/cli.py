"""The command line: `penstock score`, `penstock generate`, `penstock verify`."""

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

from ..io.errors import PenstockError
from . import plan_cli
from .options import Model, PolicyFile, Report, Settings, policy_of
from .policy import Policy
from .values import parse_setting

if TYPE_CHECKING:
    from .job import Job

ROWS_WITH_ERRORS = 1
INTERRUPTED = 130

app = typer.Typer(
    name="penstock",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Runs transformers that do not fit into memory: weights are streamed from the
checkpoint's own files while many micro-batches run through each layer that is there.

Exit codes: **0** all rows done, **1** rows with errors, **2** bad usage or bad input
file, **3** the machine cannot do it (and what would).""",
)


@app.callback()
def _callback() -> None:
    """Quiets what transformers says on its own."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


plan_cli.add_to(app)


@app.command()
def score(
    model: Model,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            help='JSONL: a row is {"id", "text"} or {"id", "prompt", "completion"}.',
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help='JSONL: {"id", "logprob", "tokens", "perplexity"} or {"id", "error"} '
            "for each row, in the input's order.",
        ),
    ],
    policy: PolicyFile = None,
    settings: Settings = None,
    report: Report = None,
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
    from .work import ScoreWork

    work = ScoreWork(window, stride)
    _run(Job(work, model, source, output, policy_of(policy, settings), report))


@app.command()
def generate(
    model: Model,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            help='JSONL: a row is {"id", "prompt"} or {"id", "messages"}.',
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help='JSONL: {"id", "completion", "tokens", "finish_reason"} or {"id", '
            '"error"} for each row, in the input\'s order.',
        ),
    ],
    max_new_tokens: Annotated[
        int, typer.Option(help="Most tokens that a completion may have.")
    ],
    policy: PolicyFile = None,
    settings: Settings = None,
    report: Report = None,
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
    from .work import GenerateWork

    values = dict(map(parse_setting, options or []))
    if temperature is not None:
        values["temperature"] = temperature
    work = GenerateWork(max_new_tokens, tuple(stop or ()), seed, values)
    _run(Job(work, model, source, output, policy_of(policy, settings), report))


def _run(job: "Job") -> None:
    from .show import report_table

    console = Console(stderr=True)
    try:
        result = job.run(console)
    except KeyboardInterrupt:
        _say(f"interrupted: the results so far are in {job.output}.partial")
        raise typer.Exit(INTERRUPTED) from None
    if console.is_terminal:
        console.print(report_table(result, f"{job.output}"))
    if result["rows_failed"]:
        _say(f"{result['rows_failed']} of {result['rows']} rows failed: {job.output}")
        raise typer.Exit(ROWS_WITH_ERRORS)


@app.command()
def verify(
    model: Model,
    policy: PolicyFile = None,
    settings: Settings = None,
    checksums: Annotated[
        bool,
        typer.Option(
            "--checksums",
            help="Instead: sums the bytes of every tensor, the first time into a file "
            "beside the checkpoint, later to compare with it.",
        ),
    ] = False,
) -> None:
    """Streamed against resident, unit by unit, bit for bit, on a few tokens.

    Says which weights are used outside of their module's forward, too. Exit code 1
    when anything differs.
    """
    chosen = policy_of(policy, settings)
    if checksums:
        _verify_checksums(model, chosen)
        return
    from .verify import verify as run

    result = run(model, chosen)
    print(
        f"{len(result.sites_run)} of {result.num_sites} sites run, "
        f"{result.num_tensors} tensors compared with {result.reference}"
    )
    for name, count in result.faults.items():
        print(f"fault: {name} is used outside of its module's forward ({count}x)")
    for difference in result.differences:
        print(f"DIFFERS: {difference}")
    print("equal, bit for bit" if result.is_equal else "NOT EQUAL")
    if not result.is_equal:
        raise typer.Exit(1)


def _verify_checksums(model: Path, policy: Policy) -> None:
    from .integrity import verify_checksums

    result = verify_checksums(model, policy)
    for difference in result.differences:
        print(f"DIFFERS: {difference}")
    if result.differences:
        print(f"NOT AS SUMMED: download it again, or delete {result.side_file}")
        raise typer.Exit(1)
    if result.was_written:
        print(
            f"wrote the checksums of {result.num_tensors} tensors: {result.side_file}"
        )
    else:
        print(f"{result.num_tensors} tensors are as they were: {result.side_file}")


@app.command()
def policy(
    file: PolicyFile = None,
    settings: Settings = None,
    schema: Annotated[
        bool, typer.Option(help="Print the JSON schema of policy files instead.")
    ] = False,
) -> None:
    """Prints the policy that a file and settings make, defaults and all, as JSON."""
    chosen = policy_of(file, settings)
    value: Any = (
        Policy.model_json_schema() if schema else chosen.model_dump(mode="json")
    )
    print(json.dumps(value, indent=2))


def _say(message: str) -> None:
    print(f"penstock: {message}", file=sys.stderr)


@contextlib.contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Shows what Penstock announces (fallbacks, faults) as it happens."""
    handler = RichHandler(
        console=Console(stderr=True), show_time=False, show_path=False
    )
    logger = logging.getLogger("penstock")
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


def main() -> None:
    """The entry point. A user's mistake is one sentence, never a traceback."""
    try:
        with _log_on_stderr():
            app()
    except PenstockError as error:
        _say(f"error: {error}")
        sys.exit(error.exit_code)
