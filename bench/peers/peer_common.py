"""What the peer scripts share: the command line, the meters, the scoring loop and
the one-line report. Each script runs inside its own peer's environment, so this file
uses nothing but the standard library and torch (imported late, see `score`), and of
`bench/common` only files that do the same."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from common import frame

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float32")

Rows = list[list[int]]


@dataclass(frozen=True)
class Options:
    """The command line, the same for every peer."""

    model: Path
    batches: list[Rows]
    cpu_memory: int
    offload_folder: Path | None
    dtype: str
    batches_as_one: bool


NEEDS = """Takes minutes for a model of billions of parameters; needs {} (see
make_envs.py), run by that environment's own Python. Prints one JSON object."""


def parser(text: str | None, environment: str) -> argparse.ArgumentParser:
    """A parser whose `--help` begins with the script's docstring and says what the
    script needs."""
    needs = NEEDS.format(f".envs/{environment}")
    return frame.parser(f"{text}\n\n{needs}")


def parse_options(text: str | None, peer: str) -> Options:
    options = parser(text, peer)
    options.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    options.add_argument(
        "--tokens",
        type=Path,
        required=True,
        help='JSON file {"batches": [[[ids...], ...], ...]}',
    )
    options.add_argument(
        "--cpu-memory",
        type=int,
        required=True,
        help="bytes that the peer is told it may hold weights in",
    )
    options.add_argument(
        "--offload-folder",
        type=Path,
        help="where the peer writes its own files (kept); left out: a temporary "
        "folder beside the checkpoint, removed at the end",
    )
    options.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    options.add_argument(
        "--batches-as-one",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="feed all micro-batches as one batch, so that the weights are read once "
        "(the default, and the fastest for every peer), or one forward each",
    )
    args = options.parse_args()
    return Options(
        model=args.model.resolve(),
        batches=json.loads(args.tokens.read_text())["batches"],
        cpu_memory=args.cpu_memory,
        offload_folder=args.offload_folder,
        dtype=args.dtype,
        batches_as_one=args.batches_as_one,
    )


@contextlib.contextmanager
def offload_folder(options: Options) -> Iterator[Path]:
    """The folder for what the peer writes. The temporary one lies beside the
    checkpoint because the system's own may be a RAM disk."""
    if options.offload_folder is not None:
        options.offload_folder.mkdir(parents=True, exist_ok=True)
        yield options.offload_folder.resolve()
        return
    with tempfile.TemporaryDirectory(
        prefix=".offload-", dir=options.model.parent, ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)


def written_bytes(folder: Path) -> int:
    """Bytes of the files under `folder`, less links to files that were there before
    (AirLLM links a shard that holds just one layer instead of copying it)."""
    total = 0
    for path in folder.rglob("*"):
        info = path.lstat()
        if path.is_file() and not path.is_symlink() and info.st_nlink == 1:
            total += info.st_size
    return total


def proc_value(file: str, key: str) -> int:
    """One number of /proc/self/FILE; memory figures come in kB there."""
    for line in Path("/proc/self", file).read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            number, *unit = value.split()
            return int(number) * (1024 if unit else 1)
    raise KeyError(key)


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python, torch, transformers and the packages named."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", *packages):
        found[name] = importlib.metadata.version(name)
    return found


class AnonymousPeak(threading.Thread):
    """Samples the process's anonymous memory. The kernel's own high-water mark
    (VmHWM) also counts pages mapped from the checkpoint, which it can drop at any
    time: this tells the two apart."""

    def __init__(self, period: float = 0.05) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._period = period

    def run(self) -> None:
        while True:
            self.sample()
            time.sleep(self._period)

    def sample(self) -> int:
        self.peak = max(self.peak, proc_value("status", "RssAnon"))
        return self.peak


@dataclass
class Meter:
    """Takes the figures of one run. Make it before the peer is imported."""

    peer: str
    import_started: float = field(default_factory=time.perf_counter)
    load_started: float = 0.0
    loaded: float = 0.0
    first_layer: float | None = None
    read_before_scoring: int = 0

    def __post_init__(self) -> None:
        # Peers print to standard output, some from C: it is kept for the report.
        self._stdout = os.dup(1)
        os.dup2(2, 1)
        self._anonymous = AnonymousPeak()
        self._anonymous.start()

    def start_loading(self) -> None:
        self.load_started = time.perf_counter()

    def finish_loading(self, model: torch.nn.Module) -> None:
        """Call with the loaded model, whose first decoder layer is watched."""
        self.loaded = time.perf_counter()
        self.read_before_scoring = proc_value("io", "read_bytes")
        first_decoder_layer(model).register_forward_pre_hook(self._mark_first_layer)

    def _mark_first_layer(self, module: torch.nn.Module, args: Any) -> None:
        if self.first_layer is None:
            self.first_layer = time.perf_counter() - self.load_started

    def report(
        self,
        options: Options,
        packages: dict[str, str],
        scores: Scores,
        folder: Path,
        **extra: Any,
    ) -> None:
        """Write the JSON object as the only line of standard output."""
        read = proc_value("io", "read_bytes")
        tokens = sum(len(row) for batch in options.batches for row in batch)
        result = {
            "peer": self.peer,
            "versions": packages,
            "dtype": options.dtype,
            "cpu_memory": options.cpu_memory,
            "batches_as_one": options.batches_as_one,
            **extra,
            "import_seconds": self.load_started - self.import_started,
            "load_seconds": self.loaded - self.load_started,
            "seconds": scores.seconds,
            "seconds_to_first_layer": self.first_layer,
            "tokens": tokens,
            "tokens_per_second": tokens / scores.seconds,
            "peak_rss_bytes": proc_value("status", "VmHWM"),
            "peak_anonymous_bytes": self._anonymous.sample(),
            "disk_written_bytes": written_bytes(folder),
            "io_write_bytes": proc_value("io", "write_bytes"),
            "disk_read_bytes": read,
            "scoring_read_bytes": read - self.read_before_scoring,
            "logprob_sums": scores.logprob_sums,
        }
        sys.stdout.flush()
        os.write(self._stdout, (json.dumps(result) + "\n").encode())


def first_decoder_layer(model: torch.nn.Module) -> torch.nn.Module:
    """The first module of the longest module list: a decoder's layers."""
    import torch

    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    layers: torch.nn.Module = max(lists, key=len)[0]
    return layers


@dataclass(frozen=True)
class Scores:
    seconds: float
    logprob_sums: list[float]


def score(forward: Callable[[torch.Tensor], torch.Tensor], options: Options) -> Scores:
    """Sum, for each row, the log-probability of each token after the first.

    `forward` takes ids [rows, length] and returns logits of the same leading shape.
    As one batch, shorter rows are padded at their end: attention is causal, so no
    position that counts can see the padding, and no mask is needed."""
    import torch

    batches = options.batches
    if options.batches_as_one:
        batches = [[row for batch in batches for row in batch]]
    sums: list[float] = []
    started = time.perf_counter()
    with torch.inference_mode():
        for rows in batches:
            longest = max(map(len, rows))
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
            logits = forward(ids)
            # Row by row: the float32 copy of all rows would be twice the logits.
            for row, row_logits in zip(rows, logits, strict=True):
                targets = torch.tensor(row[1:])
                logprobs = row_logits[: len(targets)].float().log_softmax(-1)
                sums.append(logprobs.gather(-1, targets[:, None]).sum().item())
            del logits
    return Scores(time.perf_counter() - started, sums)
