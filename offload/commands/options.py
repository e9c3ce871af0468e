"""Options that several commands of the command line have."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ...io.errors import UsageError, readable
from ..configs.checkpoint_folder import checkpoint_folder
from ..policy import Policy
from ..tasks.registry import TASKS

if TYPE_CHECKING:
    from ..jobs.kept import Mode

    TaskName = str
else:
    TaskName = Literal[tuple(TASKS)]
    """The name of a task: typer shows which there are, and takes no other."""

SOURCES = (
    "JSON lines (.jsonl, .jsonl.gz, .jsonl.zst), a JSON array (.json), CSV, a row a "
    "line (.txt), Parquet, Arrow: files, globs or folders (sorted by path), or - for "
    "standard input."
)
OUTPUTS = (
    "Its suffix says the format: JSON lines (also .gz, .zst), .csv, .parquet or "
    ".arrow; - is standard output."
)
Model = Annotated[
    Path,
    typer.Argument(
        parser=checkpoint_folder,
        metavar="MODEL",
        help="Folder of a Hugging Face checkpoint (config.json, *.safetensors, and the "
        "tokenizer's files), or the id of one that is in the hub's cache: org/name.",
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
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="What computes, as --set device=... says: cpu, cuda, cuda:1.",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="What it computes in, as --set dtype=... says: float32, bfloat16.",
    ),
]
Adapter = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        metavar="DIR",
        help="Folder of an adapter (adapter_config.json: LoRA and its like) that is "
        "applied to the model. Needs penstock[peft].",
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
Restart = Annotated[
    bool,
    typer.Option(
        "--restart/--resume",
        help="Begin anew, and write over what is there. Otherwise a job that was ended "
        "is gone on with, if its input, model and options are the same.",
    ),
]
RetryErrors = Annotated[
    bool,
    typer.Option(
        "--retry-errors",
        help="Do the rows again that failed, of an output that is done or begun.",
    ),
]
Workers = Annotated[
    int,
    typer.Option(
        "--workers",
        metavar="N",
        help="Processes of this machine that share the job, each with a model of its "
        "own: sizes of the policy that are auto and the CPU's threads are divided, "
        "host_memory is shared, and with device: cuda each takes a GPU in turn.",
    ),
]


Ranks = Annotated[
    int,
    typer.Option(
        "--ranks",
        metavar="N",
        help="Processes of this machine that share one model: each streams, holds and "
        "computes its own blocks or, with ranks: gather, reads its part of all "
        "(see docs/ranks.md). Under torchrun, its processes "
        "do, of one machine or several.",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the checkpoint, as trust_remote_code: "
        "true in the policy does. Only for what you have read and trust.",
    ),
]


def mode_of(restart: bool, retry_errors: bool) -> "Mode":
    """What a job does with results that are there already. Raises UsageError."""
    if restart and retry_errors:
        raise UsageError("--restart does all rows again: leave --retry-errors out")
    return "restart" if restart else "retry" if retry_errors else "resume"


def say(message: str) -> None:
    """Prints `message` to standard error."""
    lines = "\n".join(map(readable, message.split("\n")))
    print(f"penstock: {lines}", file=sys.stderr)


def check_alone(policy: Policy, command: str) -> None:
    """Raises UsageError for a policy with ranks, which `command` does not start."""
    if policy.ranks is not None:
        raise UsageError(
            f"{command} runs one process, and ranks: {policy.ranks} shares the model "
            "among several: run it without ranks (--set ranks=null), and add ranks to "
            "the policy of the job"
        )


def policy_of(
    path: Path | None,
    settings: list[str] | None,
    trust_remote_code: bool = False,
    adapter: Path | None = None,
    **values: str | None,
) -> Policy:
    """The policy in the file `path`, with `settings` and the other options on top:
    `values` are those of keys of the policy, None for an option that was not given."""
    settings = list(settings or [])
    settings += [f"{key}={value}" for key, value in values.items() if value is not None]
    if trust_remote_code:
        settings.append("trust_remote_code=true")
    if adapter is not None:
        settings.append(f"adapter={json.dumps(str(adapter))}")
    if path is None:
        return Policy().with_settings(settings)
    return Policy.from_yaml(path, settings)
