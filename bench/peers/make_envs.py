"""Make the peers' virtual environments, one each, under .envs beside this file.

    python bench/peers/make_envs.py [--only NAME ...] [--python PYTHON]

An environment is left alone while its requirements file and the Python it was made
with stay the same. pip's own settings apply, so an index that holds CPU-only builds of
torch is named the usual way (see README.md).

Takes minutes for each environment; needs only the standard library, a package index,
and 1.3 GB of disk for each (DeepSpeed also a C++ compiler and libaio's headers).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from common import frame  # noqa: E402

ENVS = HERE / ".envs"
PEERS = ("accelerate", "airllm", "deepspeed")


def requirements(peer: str) -> Path:
    return HERE / f"requirements-{peer}.txt"


def environment_python(peer: str) -> Path:
    return ENVS / peer / "bin" / "python"


def fingerprint(peer: str, python: str) -> str:
    """What an environment was made from: its requirements and the Python."""
    version = subprocess.run(
        [python, "-VV"], check=True, capture_output=True, text=True
    ).stdout
    pins = requirements(peer).read_bytes()
    return hashlib.sha256(pins + version.encode()).hexdigest()


def make(peer: str, python: str) -> bool:
    """Make one environment. False where the one there is up to date."""
    env = ENVS / peer
    # Written last, so an environment that was cut short is made anew.
    stamp = env / "made-from.sha256"
    wanted = fingerprint(peer, python)
    if stamp.exists() and stamp.read_text() == wanted:
        return False
    shutil.rmtree(env, ignore_errors=True)
    subprocess.run([python, "-m", "venv", str(env)], check=True)
    # DeepSpeed comes as source: its setup is told that there is no GPU to build for.
    variables = {**os.environ, "DS_ACCELERATOR": "cpu"}
    interpreter = str(environment_python(peer))
    subprocess.run(
        [interpreter, "-m", "pip", "install", "-q", "-r", str(requirements(peer))],
        check=True,
        env=variables,
    )
    if peer == "deepspeed":
        # Its ops are compiled on first use: done now, so that no run is timed with it.
        subprocess.run(
            [interpreter, "-c", "import run_deepspeed; run_deepspeed.build_ops()"],
            check=True,
            cwd=HERE,
            env=variables,
        )
    stamp.write_text(wanted)
    return True


def main() -> None:
    parser = frame.parser(__doc__)
    parser.add_argument(
        "--only",
        choices=PEERS,
        action="append",
        help="just this peer's (may be given more than once)",
    )
    parser.add_argument(
        "--python", default=sys.executable, help="the Python to make them with"
    )
    args = parser.parse_args()
    for peer in args.only or PEERS:
        made = make(peer, args.python)
        print(f"{peer}: {'made' if made else 'up to date'}", flush=True)


if __name__ == "__main__":
    main()
