"""What the mains of all scripts share: options, folders, the machine, results.

Imports only the standard library, so that `--help` is quick and a script can say which
packages are missing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

BENCH = Path(__file__).resolve().parents[1]
T = TypeVar("T")


def parser(text: str | None) -> argparse.ArgumentParser:
    """A parser whose `--help` begins with `text`, the script's docstring."""
    return argparse.ArgumentParser(
        description=(text or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


@contextmanager
def scratch(kept: Path | None = None, *, parent: Path | None = None) -> Iterator[Path]:
    """A new folder in `parent`, or in the system's temporary folder, which is removed
    at the end; or the folder `kept`, which is made if it is missing and stays."""
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="penstock-bench-", dir=parent) as name:
        yield Path(name)


def checkpoint(folder: Path, size: str) -> Path:
    """`folder`, where a checkpoint of this size is made if there is none."""
    if not folder.exists():
        from common.models import make_checkpoint

        make_checkpoint(folder, size)
    return folder


def progress(values: Iterable[T], label: str) -> Iterable[T]:
    """`values`, with a bar on standard error if that is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(values, label, console=console, disable=not console.is_terminal)


def card(folder: Path) -> dict[str, Any]:
    """Prints facts about the computer, with the disk that `folder` is on."""
    from common import machine

    facts = machine.card(folder)
    print(json.dumps(facts, indent=1), flush=True)
    return facts


def settings(args: argparse.Namespace) -> dict[str, str]:
    """The options as they are kept with the results."""
    return {name: str(value) for name, value in vars(args).items()}


def write(path: Path, text: str) -> None:
    """Writes a file of results; its folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def finish(result: Any, *, out: Path | None = None, is_good: bool = True) -> int:
    """Prints the result as the last line, one JSON value, and writes it to the file
    `out`. Returns the exit code of the script: 1 unless `is_good`."""
    if out is not None:
        write(out, json.dumps(result, indent=1))
    sys.stdout.flush()
    print(json.dumps(result), flush=True)
    return 0 if is_good else 1
