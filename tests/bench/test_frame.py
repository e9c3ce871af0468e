"""What all scripts of bench/ share, and that each says what it is for."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest

import forked_python
from common import frame

BENCH = Path(__file__).parents[2] / "bench"
SCRIPTS = sorted(
    path.relative_to(BENCH).as_posix()
    for path in BENCH.rglob("*.py")
    if ".envs" not in path.parts and '__name__ == "__main__"' in path.read_text()
)


def test_scripts_are_found() -> None:
    assert {"stream.py", "gpu_suite.py", "gpu/api.py", "peers/make_envs.py"} <= {
        *SCRIPTS
    }


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_is_measured_how_long_it_takes_and_what_it_needs(
    script: str,
) -> None:
    path = BENCH / script
    command = [str(path)]
    if path.parent.name == "gpu":  # modules of a package
        command = ["-m", f"gpu.{path.stem}"]
    env = {"PYTHONPATH": str(BENCH)}
    done = forked_python.run(
        *command, "--help", env=env, first=partial(os.chdir, path.parent)
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    usage, what, *rest = done.stdout.split("\n\n")
    assert usage.startswith("usage: ")
    assert len(what.split()) > 5
    text = " ".join(" ".join(rest).split())
    assert "Takes " in text
    assert "; needs " in text
    assert "None" not in text


def test_a_folder_that_is_kept_stays_and_another_goes(tmp_path: Path) -> None:
    with frame.scratch(kept=tmp_path / "a" / "kept") as kept:
        assert kept == tmp_path / "a" / "kept"
    assert kept.is_dir()
    with frame.scratch(parent=tmp_path) as folder:
        (folder / "file").touch()
        assert folder.parent == tmp_path
    assert not folder.exists()


def test_a_result_is_the_last_line_and_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "result.json"
    assert frame.finish({"seconds": 1.5}, out=out) == 0
    assert frame.finish([2], is_good=False) == 1
    assert capsys.readouterr().out.splitlines() == ['{"seconds": 1.5}', "[2]"]
    assert json.loads(out.read_text()) == {"seconds": 1.5}


def test_a_checkpoint_is_made_where_there_is_none(tmp_path: Path) -> None:
    folder = frame.checkpoint(tmp_path / "tiny", "tiny")
    config = folder / "config.json"
    before = config.stat().st_mtime_ns
    assert frame.checkpoint(folder, "tiny") == folder
    assert config.stat().st_mtime_ns == before
