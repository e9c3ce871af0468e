"""A program is the same for one process and for several ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from checkpoint import make_checkpoint

SCRIPT = Path(__file__).parents[2] / "ranked" / "any_number_of_ranks.py"
SETTINGS = (
    "device_memory=220KiB",
    "gather_rows=1000",
    "resident_below=10",
    "micro_batch_tokens=16",
    "tokens_in_flight=64",
)


def output(*start: str, folder: Path) -> tuple[dict[str, Any], str]:
    """What the script prints: its results, and what it says to standard error."""
    rank_variables = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    left = {k: v for k, v in os.environ.items() if k not in rank_variables}
    done = subprocess.run(
        [sys.executable, *start, str(SCRIPT), str(folder), *SETTINGS],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**left, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found, done.stderr


@pytest.mark.slow
def test_a_script_gives_the_same_alone_and_under_torchrun(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "tiny", dtype="float32", shards_of="100KB")
    alone, said = output(folder=folder)
    assert "ranks: pipeline has no effect" in said
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    where = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0")
    two, _ = output(*torchrun, *where, folder=folder)
    assert two["tokens"] == alone["tokens"]
    assert two["scores"] == alone["scores"]
    assert two["read"] < alone["read"], "each rank reads its own blocks"
