"""Kernels are compiled once, where there is a compiler; else it is said why not."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from penstock.io.codecs import compiled as module
from penstock.io.codecs.compiled import CannotCompileError, Compiled, compiled
from penstock.io.codecs.kernels import ScaledNumbers
from penstock.io.codecs.packed import PackedFloats
from penstock.io.codecs.tiles import TILES


def script(folder: Path, text: str) -> Path:
    path = folder / "a compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def compiler() -> None:
    try:
        module._compiler()
    except CannotCompileError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("compiler")
def test_several_at_once_compile_and_later_ones_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: compiled(tmp_path), range(3)))
    (made,) = tmp_path.iterdir()
    monkeypatch.setattr(subprocess, "Popen", None)
    compiled(tmp_path)
    assert list(tmp_path.iterdir()) == [made]


@pytest.mark.usefixtures("compiler")
def test_whatever_torchs_defaults_are(tmp_path: Path) -> None:
    with torch.device("meta"):
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            compiled(tmp_path)
        finally:
            torch.set_default_dtype(dtype)


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(CannotCompileError, match="there is no C compiler"):
        compiled(tmp_path)
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    with pytest.raises(CannotCompileError, match="there is no C compiler"):
        compiled(tmp_path)
    monkeypatch.setenv("CC", "cc '-O2")
    with pytest.raises(CannotCompileError, match=r"CC is .*No closing quotation"):
        compiled(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("echo 'it is ill' >&2; exit 1", "it is ill"),
        ("exit 3", "exit code 3"),
        ("exit 0", "No such file"),
        ('for it; do last="$it"; done; echo nonsense > "$last"', "decode-"),
    ],
)
def test_a_compiler_that_fails(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", f"'{script(tmp_path, text)}'")
    with pytest.raises(CannotCompileError, match=said):
        compiled(tmp_path / "cache")


def test_a_compiler_that_does_not_end_is_ended_with_all_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no terminal either, where it could wait for an answer."""
    begun = tmp_path / "begun"
    os.mkfifo(begun)
    text = (
        f"sleep 1000 & (: < /dev/tty) 2> /dev/null && exit 1; echo $! > '{begun}'; wait"
    )
    monkeypatch.setenv("CC", f"'{script(tmp_path, text)}'")
    children: list[int] = []

    def never(self: subprocess.Popen[str], timeout: float) -> None:
        children.append(int(begun.read_text()))
        raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(subprocess.Popen, "communicate", never)
    with pytest.raises(CannotCompileError, match="it did not end in 60 seconds"):
        compiled(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    (child,) = children
    status = Path(f"/proc/{child}/stat")
    while status.exists() and status.read_text().split()[2] not in "ZX":
        pass


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("num_bytes", [0, 1_000, 8_192])
def test_what_was_cut_off_is_compiled_again(num_bytes: int, tmp_path: Path) -> None:
    """The loader of the system maps it, and the process ends at what is not there."""
    compiled(tmp_path)
    (made,) = tmp_path.iterdir()
    content = made.read_bytes()
    made.unlink()  # this process has mapped it
    made.write_bytes(content[:num_bytes])
    compiled(tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [content]


@pytest.mark.usefixtures("compiler")
def test_fast_math_of_the_compiler_leaves_small_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it links in would set the thread that loads it to write zeros for them."""
    monkeypatch.setenv("CC", f"{module._compiler()[0]} -ffast-math")

    def halved() -> float:
        compiled(tmp_path)
        return sys.float_info.min / float(len("ab"))

    with ThreadPoolExecutor() as pool:
        assert pool.submit(halved).result() > 0


@pytest.mark.usefixtures("compiler")
def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(CannotCompileError, match="File exists"):
        compiled(tmp_path / "cache")


@pytest.mark.usefixtures("compiler")
def test_code_that_packs_other_bits_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(self: Compiled, target: torch.Tensor, numbers: PackedFloats) -> None:
        TILES.write_packed(target, numbers)
        target[-1, -1] = 0

    monkeypatch.setattr(Compiled, "write_packed", wrong)
    with pytest.raises(CannotCompileError, match="other bits of packed bfloat16"):
        compiled(tmp_path)


@pytest.mark.usefixtures("compiler")
def test_code_that_makes_other_bits_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong:
        def write_scaled(self, target: torch.Tensor, numbers: ScaledNumbers) -> None:
            target.zero_()

        def write_packed(self, target: torch.Tensor, numbers: PackedFloats) -> None:
            target.zero_()

    monkeypatch.setattr(module, "Compiled", lambda library: Wrong())
    with pytest.raises(CannotCompileError, match="other bits"):
        compiled(tmp_path)
