"""Compiles the simulated GPU, once for each version of torch and of its sources."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).parent
CACHE = HERE.parent.parent / "build" / "simgpu"
# Two files for the compiler, since what they include takes longer than what they say.
_GROUPS = (
    ("tensors", "traits", "dispatch", "copies", "views", "api", "autocast"),
    ("schedule", "streams", "syncs", "trace", "addresses", "memory", "pinned", "hooks"),
)
_FLAGS = ("-std=c++20", "-O0", "-fPIC", "-w")


class NoCompilerError(Exception):
    """There is no C++ compiler here."""


def _compiler() -> str:
    name = os.environ.get("CXX", "c++")
    found = shutil.which(name)
    if found is None:
        raise NoCompilerError(f"there is no C++ compiler called {name}")
    return found


def _version() -> str:
    sources = hashlib.sha256(" ".join(_FLAGS).encode())
    for path in sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h")]):
        sources.update(path.read_bytes())
    return f"{torch.__version__}-{sources.hexdigest()[:16]}"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()[:2000]}")


def _compile(target: Path) -> None:
    # Imports setuptools.
    from torch.utils.cpp_extension import include_paths, library_paths

    compiler = _compiler()
    paths = include_paths()
    include = [f"-I{path}" for path in (*paths, f"{paths[0]}/kineto")]
    folders = library_paths()
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        work = Path(name)

        def compile_group(number: int) -> None:
            group = work / f"{number}.cpp"
            files = (HERE / f"{each}.cpp" for each in _GROUPS[number])
            group.write_text("".join(f'#include "{file}"\n' for file in files))
            output = str(group.with_suffix(".o"))
            flags = [*_FLAGS, abi, *include]
            _run([compiler, *flags, "-c", str(group), "-o", output])

        with ThreadPoolExecutor() as pool:
            list(pool.map(compile_group, range(len(_GROUPS))))
        objects = [str(work / f"{number}.o") for number in range(len(_GROUPS))]
        links = [f"-L{path}" for path in folders]
        links += [f"-Wl,-rpath,{path}" for path in folders]
        built = work / "built.so"
        libraries = ["-ltorch_cpu", "-lc10"]
        _run([compiler, "-shared", *objects, *links, *libraries, "-o", str(built)])
        built.replace(target)


def compiled() -> Path:
    """The compiled device, which other processes may be compiling at the same time.

    Raises NoCompilerError where there is none, RuntimeError where it fails.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    target = CACHE / f"simgpu-{_version()}.so"
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _compile(target)
    return target
