"""The commands that ask something of texts: `penstock embed`, `penstock classify`."""

from pathlib import Path
from typing import Annotated

import typer

from .cli_jobs import run
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
)
from .pooling import Pooling


def embed(
    model: Model,
    source: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help='A row is {"id", "text"}. ' + SOURCES),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help='{"id", "embedding", "tokens"} or {"id", "error"} for each row, in '
            "the input's order. " + OUTPUTS,
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
    pooling: Annotated[
        Pooling,
        typer.Option(
            help="How one vector is made of those of a text's tokens: their mean, the "
            "first (cls), the last, or the max of each number. auto: as the "
            "checkpoint's sentence-transformers files say, else mean for an encoder "
            "and last for a decoder."
        ),
    ] = "auto",
    normalize: Annotated[
        bool | None,
        typer.Option(
            help="Whether vectors have length 1. Without it, as the checkpoint's "
            "sentence-transformers files say, else not."
        ),
    ] = None,
    truncate: Annotated[
        int | None,
        typer.Option(
            help="Cut texts to so many tokens. Without it one that is longer than the "
            "model's context is an error."
        ),
    ] = None,
) -> None:
    """A vector for each text, by an encoder or a decoder.

    Example: `penstock embed ./minilm texts.jsonl -o vectors.parquet --report out/`
    """
    from .job import Job
    from .watch import Watching
    from .work import EmbedWork

    work = EmbedWork(pooling, normalize, truncate)
    chosen = policy_of(policy, settings)
    mode = mode_of(restart, retry_errors)
    watching = Watching(log_json, metrics)
    job = Job(work, model, source, output, chosen, report, mode, watching, workers)
    run(job)


def classify(
    model: Model,
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help='A row is {"id", "prompt"}, and may have "labels". ' + SOURCES,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help='{"id", "label", "logprobs", "probabilities", "tokens"} or {"id", '
            '"error"} for each row, in the input\'s order. ' + OUTPUTS,
        ),
    ],
    labels: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            help="What may come next, of rows without labels. Repeatable. Begin it "
            "with a space where the text goes on with one.",
        ),
    ] = None,
    policy: PolicyFile = None,
    settings: Settings = None,
    report: Report = None,
    log_json: LogJson = False,
    metrics: Metrics = None,
    restart: Restart = False,
    retry_errors: RetryErrors = False,
    workers: Workers = 1,
) -> None:
    """Which of some labels comes next, and how likely, under a causal language model.

    Example: `penstock classify ./llama-3b reviews.jsonl -o labels.jsonl --label " good"
    --label " bad"`
    """
    from .job import Job
    from .watch import Watching
    from .work import ClassifyWork

    work = ClassifyWork(tuple(labels or ()))
    chosen = policy_of(policy, settings)
    mode = mode_of(restart, retry_errors)
    watching = Watching(log_json, metrics)
    job = Job(work, model, source, output, chosen, report, mode, watching, workers)
    run(job)
