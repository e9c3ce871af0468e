"""What a command imports, counted: noise cannot move it."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import forked_python
from checkpoint import make_checkpoint
from penstock.offload.startup import hidden, rare_collections

BENCH = Path(__file__).parents[2] / "bench" / "start.py"
HEAVY = (
    "IPython",
    "datasets",
    "jax",
    "matplotlib",
    "pandas",
    "pyarrow",
    "ray",
    "scipy",
    "sklearn",
    "tensorflow",
    "torchvision",
)
_PROBE = """
import json, runpy, sys
sys.argv = ["penstock", *json.loads(sys.argv[1])]
from penstock.offload.cli import main
code = 0
try:
    main()
except SystemExit as error:
    code = error.code
found = [name for name, module in sys.modules.items() if module is not None]
print(json.dumps([code, found]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    return make_checkpoint(path, "tiny", dtype="float32")


def modules_of(*arguments: str) -> set[str]:
    """The modules that are imported when `penstock` has run with `arguments`."""
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    code, found = json.loads(done.stdout.splitlines()[-1])
    assert code in (0, None), done.stderr
    return set(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["--help"], ["score", "--help"], ["plan", "--help"], ["policy"]]
)
def test_what_computes_nothing_imports_no_torch(arguments: list[str]) -> None:
    found = modules_of(*arguments)
    assert not {"torch", "transformers", "numpy", "psutil"} & found


@pytest.mark.slow
def test_a_job_imports_nothing_heavy_that_it_does_not_use(
    folder: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": 1, "text": "a few words"}\n')
    found = modules_of("score", str(folder), str(rows), "-o", str(tmp_path / "o.jsonl"))
    assert "torch" in found
    assert not set(HEAVY) & found


def test_nothing_is_hidden_from_a_transformers_that_has_looked_already() -> None:
    __import__("transformers")
    with hidden(["this"]):
        assert "this" not in sys.modules


def test_what_is_hidden_is_found_again_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    assert "this" not in sys.modules
    with hidden(["this", "json"]):
        assert sys.modules["json"] is json, "what is imported already stays"
        with pytest.raises(ImportError):
            __import__("this")
    assert "this" not in sys.modules


def test_garbage_is_looked_for_as_before_once_the_imports_are_over() -> None:
    before = gc.get_threshold()
    with rare_collections():
        assert gc.get_threshold() > before
    assert gc.get_threshold() == before


def test_garbage_is_looked_for_as_before_once_all_threads_have_loaded() -> None:
    before = gc.get_threshold()
    one, two = rare_collections(), rare_collections()
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    assert gc.get_threshold() > before
    two.__exit__(None, None, None)
    assert gc.get_threshold() == before


@pytest.mark.slow
def test_every_stage_of_the_start_is_timed(folder: Path) -> None:
    options = ("--model", folder, "--child", "penstock")
    done = forked_python.run(BENCH, *options)
    assert done.returncode == 0, done.stderr
    stages = json.loads(done.stdout.splitlines()[-1])["stages"]
    assert next(iter(stages)) == "import torch"
    assert list(stages)[-2:] == ["first block", "all"]


@pytest.mark.slow
@pytest.mark.whole
def test_the_benchmark_of_the_start_times_every_stage(folder: Path) -> None:
    command = [sys.executable, str(BENCH), "--model", str(folder), "--runs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    stages = found["penstock"]["stages"]
    assert next(iter(stages)) == "import torch"
    assert list(stages)[-2:] == ["first block", "all"]
    assert found["penstock"]["num_modules"] > 1000
    assert list(found["ceiling"]["stages"]) == [
        "import torch",
        "import transformers",
        "all",
    ]
