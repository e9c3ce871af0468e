"""Options that several commands of the command line have."""

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from ..io.errors import UsageError
from .policy import Policy

Model = Annotated[
    Path,
    typer.Argument(
        help="Folder of a Hugging Face checkpoint: config.json, *.safetensors, and the "
        "tokenizer's files."
    ),
]
PolicyFile = Annotated[
    Path | None,
    typer.Option("--policy", help="YAML file that says how to stream the model."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Sets one key of the policy, such as device_memory=2GiB, dtype=float32 or "
        "io.threads=4. Repeatable; wins over the file.",
    ),
]
Report = Annotated[
    Path | None,
    typer.Option(
        "--report", help="Folder for report.json: speed, bytes, what bound the run."
    ),
]


def policy_of(path: Path | None, settings: list[str] | None) -> Policy:
    """The policy in the file `path`, with `settings` on top."""
    chosen = Policy() if path is None else Policy.from_yaml(path)
    return chosen.with_settings(settings or [])


def values_of(options: list[str] | None) -> dict[str, Any]:
    """`key=value` options as a dict, values as YAML writes them."""
    values = {}
    for option in options or []:
        key, equals, text = option.partition("=")
        if not equals:
            raise UsageError(f"{option!r} is no option: write key=value")
        try:
            values[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            problem = " ".join(str(error).split())
            raise UsageError(f"{option!r}: no YAML: {problem}") from None
    return values
