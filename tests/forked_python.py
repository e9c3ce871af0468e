"""Python processes of their own that begin at once: forked from one that has imported
what takes seconds, torch and transformers."""

from __future__ import annotations

import io
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

COMMAND = ("-c", "from penstock.offload.cli import main; main()")
"""The command `penstock`."""
_PRELOADED = (
    "torch",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "penstock.offload.cli",
    "penstock.offload.engine.build",
    "hypothesis",
    "pytest",
)
context = multiprocessing.get_context("forkserver")


def ensure_running() -> None:
    """Starts what they are forked from, once; it lives as long as this process."""
    context.set_forkserver_preload(list(_PRELOADED))
    forkserver.ensure_running()


def run(
    *arguments: object,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    first: Callable[[], None] | None = None,
    seconds: float = 240,
) -> subprocess.CompletedProcess[str]:
    """Like `subprocess.run([sys.executable, *arguments])`, where `arguments` begin with
    `-c CODE`, `-m MODULE` or a script.

    `env` is added to the environment of this process. `first` is called before the
    code. A process that takes longer than `seconds` is killed.
    """
    words = [str(argument) for argument in arguments]
    ensure_running()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "0").write_bytes(stdin)
        values = {**os.environ, **(env or {})}
        process = context.Process(target=_begin, args=(words, folder, values, first))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
        code = process.exitcode
        process.close()
        assert code is not None, "it has ended"
        out, err = ((folder / each).read_text() for each in "12")
    return subprocess.CompletedProcess([sys.executable, *words], code, out, err)


def _begin(
    words: Sequence[str],
    folder: Path,
    env: Mapping[str, str],
    first: Callable[[], None] | None,
) -> None:
    for number, mode in enumerate(("rb", "wb", "wb")):
        with (folder / f"{number}").open(mode) as file:
            os.dup2(file.fileno(), number)
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [p for p in env.get("PYTHONPATH", "").split(os.pathsep) if p]
    if first is not None:
        first()
    kind, *rest = words
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = list(rest)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")
