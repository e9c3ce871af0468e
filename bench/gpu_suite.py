"""Runs everything that must be seen on a GPU, in one command and less than eight
minutes: tests, the rates of links, streaming compared with its ceilings and with other
libraries, and a trace of who waits for whom.

    python bench/gpu_suite.py --out DIR [--dry-run] [--only PART ...]

Needs a checkout and torch. Other missing packages are listed first, and the parts that
need them are left out. Each part (bench/gpu/PART.py) is a process with a time limit. A
part that fails or hangs is reported and does not stop the others. After each of them
DIR holds `suite.json` and `card.md`; at the end also `log.txt` and the traces.
`--dry-run` does all of it with very small sizes on the simulated GPU of the tests, or
on the CPU where there is no C++ compiler for it; the results say which. The exit code
is 1 if anything failed.

Takes at most eight minutes (`--seconds`), a dry run two; needs a GPU with 20 GB of
memory, and 90 GB of host memory for the whole model (with less it has fewer blocks).
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

from common import frame  # noqa: E402
from gpu.card import markdown  # noqa: E402

KNOWN = (
    "torch",
    "numpy",
    "psutil",
    "safetensors",
    "transformers",
    "greenlet",
    "pydantic",
    "platformdirs",
    "yaml",
    "aiofiles",
    "libaio",
    "xxhash",
    "pytest",
    "hypothesis",
    "accelerate",
)
_WHOLE = (
    "torch",
    "psutil",
    "safetensors",
    "transformers",
    "greenlet",
    "pydantic",
    "platformdirs",
    "yaml",
)
_BLOCKS = ("torch", "psutil", "transformers")
_TAIL_LINES = 15
_KILLED_SECONDS = 20
"""How long a killed process may take to go: one that hangs in the driver stays."""


@dataclass(frozen=True)
class Part:
    """One process of the suite."""

    name: str
    module: str
    limit_seconds: float
    needs: tuple[str, ...]


PARTS = (
    Part("machine", "gpu.facts", 45, ("torch",)),
    Part("links", "gpu.links", 75, ("torch", "psutil")),
    Part("streaming", "gpu.streaming", 85, _BLOCKS),
    Part("api", "gpu.api", 95, _WHOLE),
    Part("rivals", "gpu.rivals", 85, _BLOCKS),
    Part("tracing", "gpu.tracing", 55, _BLOCKS),
    Part("tests", "gpu.checks", 100, ("torch", "pytest", "hypothesis", "safetensors")),
    Part("tiers", "gpu.tiers", 70, _WHOLE),
)
"""In order of importance."""
_COMPILE_SECONDS = 120
"""The first part of a dry run may have to compile the simulated GPU."""


def main() -> int:
    args = parse_args()
    # Ending the suite also ends the running part, and removes its files.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    for folder in (args.out, args.work):
        folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in KNOWN if importlib.util.find_spec(name) is None]
    suite = Suite(args, missing)
    print(suite.prerequisites, flush=True)
    with frame.scratch(parent=args.work) as work:
        # The repository's root is the package. This link gives it the package's name,
        # whatever the folder of the checkout is called.
        (work / "penstock").symlink_to(ROOT)
        with (args.out / "log.txt").open("w") as log:
            for part in PARTS:
                if not args.only or part.name in args.only:
                    suite.run(part, work, log)
    print((args.out / "card.md").read_text())
    return 1 if suite.has_failed else 0


class Suite:
    """Runs parts one after the other, and writes the results so far after each."""

    def __init__(self, args: argparse.Namespace, missing: list[str]) -> None:
        self._args = args
        self._missing = missing
        self._started = time.monotonic()
        self._parts: dict[str, dict[str, Any]] = {}
        self._device: str | None = None
        self.prerequisites = (
            f"Not installed: {', '.join(missing)}; what needs them is skipped."
            if missing
            else "Every package that the suite knows of is installed."
        )

    @property
    def has_failed(self) -> bool:
        return any(part["stderr_tail"] for part in self._parts.values())

    def run(self, part: Part, work: Path, log: IO[str]) -> None:
        lacking = [name for name in part.needs if name in self._missing]
        left = self._args.seconds - (time.monotonic() - self._started)
        compiling = _COMPILE_SECONDS if self._args.dry_run and not self._parts else 0
        limit = min(part.limit_seconds + compiling, left)
        if lacking:
            self._note(part, f"skipped: no {', '.join(lacking)}", 0.0, {}, [])
        elif limit < 5:
            self._note(part, "skipped: no time left", 0.0, {}, [])
        else:
            self._run(part, limit, work, log)
        self._write()

    def _run(self, part: Part, limit: float, work: Path, log: IO[str]) -> None:
        print(f"{part.name} ... (at most {limit:.0f} s)", flush=True)
        figures, scratch = work / f"{part.name}.json", work / part.name
        scratch.mkdir()
        command = [sys.executable, "-m", part.module, "--out", str(figures)]
        command += ["--kept", str(self._args.out.resolve()), "--work", str(scratch)]
        command += ["--seconds", str(limit)]
        if self._args.dry_run:
            command.append("--dry-run")
        stderr = work / f"{part.name}.stderr"
        start = time.monotonic()
        with stderr.open("w") as errors, (work / "stdout").open("w") as output:
            env = environment(work, is_dry=self._args.dry_run)
            code = supervise(command, limit, env, output, errors)
        seconds = time.monotonic() - start
        text = stderr.read_text(errors="replace")
        printed = (work / "stdout").read_text(errors="replace")
        log.write(f"==== {part.name}\n{printed}\n---- its stderr\n{text}\n")
        log.flush()
        shutil.rmtree(scratch, ignore_errors=True)
        status = "done"
        if code is None:
            status = f"FAILED: killed after {limit:.0f} s"
        elif code:
            status = f"FAILED: exit code {code}"
        tail = text.strip().splitlines()[-_TAIL_LINES:] or ["(no output)"]
        found = json.loads(figures.read_text()) if figures.exists() else {}
        errors_of = [name for name, v in found.items() if _is_error(v)]
        if status == "done" and errors_of:
            status = f"FAILED in part: {', '.join(errors_of)}"
            tail = [f"{name}: {found[name]['error']}" for name in errors_of]
        self._note(part, status, seconds, found, [] if status == "done" else tail)

    def _note(
        self,
        part: Part,
        status: str,
        seconds: float,
        figures: dict[str, Any],
        tail: list[str],
    ) -> None:
        self._parts[part.name] = {
            "status": status,
            "seconds": seconds,
            "figures": figures,
            "stderr_tail": tail,
        }
        print(f"{part.name}: {status} ({seconds:.0f} s)", flush=True)
        if self._device is None and "device" in figures:
            self._device = figures["device"]
            print(f"The device is {self._device}.", flush=True)

    def _write(self) -> None:
        suite = {
            "prerequisites": self.prerequisites,
            "missing": self._missing,
            "is_dry_run": self._args.dry_run,
            "device": self._device,
            "date": time.strftime("%Y-%m-%d"),
            "seconds": time.monotonic() - self._started,
            "parts": self._parts,
        }
        frame.write(self._args.out / "suite.json", json.dumps(suite, indent=1))
        frame.write(self._args.out / "card.md", markdown(suite))


def supervise(
    command: list[str],
    limit: float,
    env: dict[str, str],
    stdout: IO[str],
    stderr: IO[str],
) -> int | None:
    """Runs `command` and returns its exit code.

    Returns None if it ran longer than `limit` seconds; then it is killed with all
    processes that it started.
    """
    process = subprocess.Popen(
        command,
        cwd=HERE,
        env=env,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILLED_SECONDS)


def environment(work: Path, *, is_dry: bool) -> dict[str, str]:
    folders = [str(work), str(HERE), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, folders)),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Several threads make products of that size slower.
        **({"OMP_NUM_THREADS": "1"} if is_dry else {}),
    }


def _is_error(value: Any) -> bool:
    return isinstance(value, dict) and "error" in value


def parse_args() -> argparse.Namespace:
    parser = frame.parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--work", type=Path, help="for what is removed: a real disk")
    parser.add_argument("--seconds", type=float, default=465.0, help="for all parts")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", nargs="*", choices=[p.name for p in PARTS])
    args = parser.parse_args()
    args.work = args.work or args.out
    return args


if __name__ == "__main__":
    sys.exit(main())
