"""When the kernel's queue breaks, the reader of libaio hangs nobody, keeps nothing."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kernel_aio
from penstock.io.checkpoint.header import FileStamp
from penstock.io.errors import ReadError
from penstock.io.extent import Extent
from penstock.io.fallbacks import Fallbacks
from penstock.io.handle import Handle
from penstock.io.readers import libaio_reader as aio
from penstock.io.readers.libaio_reader import LibaioReader
from penstock.io.readers.queued_reader import PartQueue

pytestmark = [
    pytest.mark.usefixtures("no_leaks"),
    pytest.mark.skipif(aio.why_not() is not None, reason=kernel_aio.why_skipped()),
]

PAGE = 4096
DEPTH = 4


def break_queue(
    monkeypatch: pytest.MonkeyPatch, before: Callable[[], list[Any]]
) -> list[int]:
    """Lets the first wait for events do what `before` does, and all others fail.
    Returns the list that each wait is noted in."""
    import libaio

    waits: list[int] = []

    class Broken(libaio.AIOContext):  # type: ignore[misc]
        def getEvents(self, min_nr: int) -> list[Any]:
            waits.append(min_nr)
            if len(waits) == 1:
                return before()
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(libaio, "AIOContext", Broken)
    return waits


def submit_all(
    reader: LibaioReader, path: Path, memory: mmap.mmap, num_reads: int
) -> list[Handle]:
    return [
        reader.submit(
            Extent(path, page * PAGE, PAGE),
            memoryview(memory)[page * PAGE : (page + 1) * PAGE],
        )
        for page in range(num_reads)
    ]


def close(reader: LibaioReader) -> None:
    """Closes `reader`, or fails where that hangs."""
    closer = threading.Thread(target=reader.close, daemon=True)
    closer.start()
    closer.join(timeout=20)
    assert not closer.is_alive(), "closing hangs"


def errors_of(handles: list[Handle]) -> list[ReadError]:
    assert all(handle.is_done for handle in handles)
    errors = []
    for handle in handles:
        with pytest.raises(ReadError, match="queue of reads is broken") as caught:
            handle.wait()
        errors.append(caught.value)
    return errors


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(256)) * 256)
    return path


@pytest.mark.parametrize("num_reads", [1, DEPTH, 3 * DEPTH])
@pytest.mark.parametrize("direct", [True, False])
def test_a_queue_that_breaks_while_closing_fails_every_read_and_keeps_no_buffer(
    num_reads: int, direct: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_closing = threading.Event()

    class Watched(PartQueue[memoryview]):
        def close(self, num_takers: int) -> None:
            super().close(num_takers)
            is_closing.set()

    def wait_for_close() -> list[Any]:
        is_closing.wait()
        return []

    monkeypatch.setattr(aio, "PartQueue", Watched)
    waits = break_queue(monkeypatch, wait_for_close)
    memory = mmap.mmap(-1, num_reads * PAGE)
    reader = LibaioReader(
        {path: FileStamp.of(path.stat())},
        depth=DEPTH,
        chunk_bytes=PAGE,
        direct=direct,
        fallbacks=Fallbacks(),
    )
    handles = submit_all(reader, path, memory, num_reads)
    close(reader)
    errors = errors_of(handles)
    assert len(waits) == 2
    memory.close()  # BufferError, if anybody still had a view of it
    for page, error in enumerate(errors):
        assert f"at {page * PAGE} of {path}" in str(error)
        assert isinstance(error.__cause__, OSError)


def test_a_queue_that_broke_fails_every_later_read_at_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_queue(monkeypatch, list)
    memory = mmap.mmap(-1, 8 * PAGE)
    reader = LibaioReader(
        {path: FileStamp.of(path.stat())},
        depth=DEPTH,
        chunk_bytes=PAGE,
        direct=True,
        fallbacks=Fallbacks(),
    )
    handles = submit_all(reader, path, memory, 8)
    for handle in handles:
        handle.wait_quietly()
    later = submit_all(reader, path, memory, 2)
    for handle in later:
        handle.wait_quietly()
    errors = errors_of(handles + later)
    assert len(errors) == 10
    close(reader)
    memory.close()  # BufferError, if anybody still had a view of it
