"""Options that several commands of the command line have."""

from pathlib import Path
from typing import Annotated

import typer

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
    typer.Option(
        "--policy",
        help="YAML file that says how to stream the model, or the name of a shipped "
        "policy (`penstock policy --list`).",
    ),
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
        "--report",
        help="Folder for report.html (a page that says how fast it was, what bound it "
        "and what to change, with pictures), report.json and trace.json.",
    ),
]
LogJson = Annotated[
    bool,
    typer.Option(
        "--log-json",
        help="Print one JSON object every five seconds to standard error: counters, "
        "speeds, time left.",
    ),
]
Metrics = Annotated[
    Path | None,
    typer.Option(
        "--metrics",
        metavar="FILE.prom",
        help="Prometheus text file, written anew every five seconds, for "
        "node_exporter's textfile collector. Needs penstock[metrics].",
    ),
]


def policy_of(path: Path | None, settings: list[str] | None) -> Policy:
    """The policy in the file `path`, with `settings` on top."""
    if path is None:
        return Policy().with_settings(settings or [])
    return Policy.from_yaml(path, settings or [])
