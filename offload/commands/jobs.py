"""The commands that do something with rows: `penstock score`, `penstock generate`,
`penstock embed`, `penstock classify`."""

from typing import TYPE_CHECKING, Annotated

import typer

from ...io.errors import UsageError
from ..settings.values import Pooling, parse_setting
from .job_command import job_command

if TYPE_CHECKING:
    from ..jobs.work import ClassifyWork, EmbedWork, GenerateWork, ScoreWork

_OWN_OPTIONS = {
    "max_new_tokens": "--max-new-tokens",
    "seed": "--seed",
    "stop": "--stop",
    **dict.fromkeys(("model", "parts", "progress", "tokenizer"), "something else"),
}
"""Names that mean something else than an option of transformers, and what says it."""


@job_command(
    '{"id", "text"} or {"id", "prompt", "completion"}',
    '{"id", "logprob", "tokens", "perplexity"}',
)
def score(
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
) -> "ScoreWork":
    """Log-probability of each text (or completion) under a causal language model.

    Example: `penstock score ./llama-3b texts.jsonl -o scores.jsonl --set
    device_memory=1GiB --report out/`
    """
    from ..jobs.work import ScoreWork

    return ScoreWork(window, stride)


@job_command(
    '{"id", "prompt"} or {"id", "messages"}',
    '{"id", "completion", "tokens", "finish_reason"}',
)
def generate(
    max_new_tokens: Annotated[
        int, typer.Option(help="Most tokens that a completion may have.")
    ],
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
) -> "GenerateWork":
    """Completes each prompt (or chat) with a language model.

    Example: `penstock generate ./llama-3b prompts.jsonl -o completions.jsonl
    --max-new-tokens 64 --set device_memory=1GiB --set sequences_in_flight=256`
    """
    from ..jobs.work import GenerateWork

    values = dict(map(parse_setting, options or []))
    if own := _OWN_OPTIONS.keys() & values.keys():
        key = min(own)
        raise UsageError(f"{key} is no --option: give {_OWN_OPTIONS[key]}")
    if temperature is not None:
        values["temperature"] = temperature
    return GenerateWork(max_new_tokens, tuple(stop or ()), seed, values)


@job_command('{"id", "text"}', '{"id", "embedding", "tokens"}')
def embed(
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
) -> "EmbedWork":
    """A vector for each text, by an encoder or a decoder.

    Example: `penstock embed ./minilm texts.jsonl -o vectors.parquet --report out/`
    """
    from ..jobs.work import EmbedWork

    return EmbedWork(pooling, normalize, truncate)


@job_command(
    '{"id", "prompt"}, and may have "labels"',
    '{"id", "label", "logprobs", "probabilities", "tokens"}',
)
def classify(
    labels: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            help="What may come next, of rows without labels. Repeatable. Begin it "
            "with a space where the text goes on with one.",
        ),
    ] = None,
) -> "ClassifyWork":
    """Which of some labels comes next, and how likely, under a causal language model.

    Example: `penstock classify ./llama-3b reviews.jsonl -o labels.jsonl --label " good"
    --label " bad"`
    """
    from ..jobs.work import ClassifyWork

    return ClassifyWork(tuple(labels or ()))
