"""Which addresses a drive reads to directly is tried, not assumed."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

import penstock
import zoo
from checkpoints import shift_tensors
from penstock import Policy
from penstock.io.checkpoint.index import open_checkpoint
from penstock.io.readers.files import ALIGNMENT, memory_alignment, open_direct
from penstock.offload.engine.readers import memory_alignment_of
from penstock.offload.policy import IO

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "x"
    path.write_bytes(bytes(2 * ALIGNMENT))
    return path


def address_of(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


@pytest.mark.parametrize("needed", [1, 4, 8, 512, ALIGNMENT])
def test_the_least_that_a_drive_takes_is_found(
    needed: int, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def preadv(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if not isinstance(buffers[0], mmap.mmap) and address_of(buffers[0]) % needed:
            raise OSError(errno.EINVAL, "Invalid argument")
        return ALIGNMENT

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "O_DIRECT", 0, raising=False)
    found = memory_alignment(file)
    assert found % needed == 0
    assert found == {1: 4, 4: 4, 8: 512}.get(needed, needed)


def test_the_drive_of_this_machine_takes_what_is_found(file: Path) -> None:
    found = memory_alignment(file)
    descriptor = open_direct(file)
    if descriptor is None:
        assert found == 1
        return
    try:
        with (
            mmap.mmap(-1, 2 * ALIGNMENT) as pages,
            memoryview(pages) as view,
            view[found : found + ALIGNMENT] as buffer,
        ):
            assert os.preadv(descriptor, [buffer], 0) == ALIGNMENT
    finally:
        os.close(descriptor)


def test_reads_through_the_page_cache_land_anywhere(tmp_path: Path) -> None:
    zoo.save_checkpoint("llama", tmp_path)
    stamps = open_checkpoint(tmp_path).stamps
    assert memory_alignment_of(stamps, IO(reader="aiofiles")) == 1
    assert memory_alignment_of(stamps, IO(direct=False)) == 1


def test_a_file_that_cannot_be_opened_is_somebody_elses_error(tmp_path: Path) -> None:
    assert memory_alignment(tmp_path / "missing") == 1


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("reader", ["threads", "aiofiles"])
def test_what_is_used_as_stored_is_not_copied(
    name: str, reader: str, tmp_path: Path
) -> None:
    zoo.save_checkpoint(name, tmp_path)
    shift_tensors(tmp_path, 8)
    policy = Policy(device_memory="128KiB", io={"reader": reader})
    with penstock.load(tmp_path, policy) as model:
        model(**zoo.inputs(name))
        assert penstock.statistics(model).bytes_copied == 0


def test_experts_are_not_moved_where_reads_land_anywhere(tmp_path: Path) -> None:
    zoo.save_checkpoint("mixtral", tmp_path)
    shift_tensors(tmp_path, 8)
    copied = {}
    for direct in (False, True):
        policy = Policy(device_memory="256KiB", io={"direct": direct})
        with penstock.load(tmp_path, policy) as model:
            model(**zoo.inputs("mixtral"))
            copied[direct] = penstock.statistics(model).bytes_copied
    assert copied[False] <= copied[True]
