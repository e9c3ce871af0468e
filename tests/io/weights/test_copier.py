"""Pieces come by way of buffers, in order, several of them under way at once."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from penstock.io.errors import ClosedError
from penstock.io.extent import Extent
from penstock.io.handle import Handle
from penstock.io.weights import copier as copying
from penstock.io.weights.copier import BounceCopier, CopyTask

PATH = Path("weights")


class Drive:
    """Reads end when they are told to; byte `n` of the file is `n % 251`."""

    def __init__(self) -> None:
        self.asked: list[tuple[Extent, memoryview, Handle]] = []
        self.changed = threading.Condition()

    def submit(self, unit: str, extent: Extent, buffer: memoryview) -> Handle:
        assert extent.offset % 16 == extent.nbytes % 16 == 0
        handle = Handle(1)
        with self.changed:
            self.asked.append((extent, buffer, handle))
            self.changed.notify_all()
        return handle

    def wait_for(self, num: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.asked) >= num, timeout=60)

    def bring(self, number: int, error: BaseException | None = None) -> None:
        extent, buffer, handle = self.asked[number]
        buffer[:] = bytes(n % 251 for n in range(extent.offset, extent.end))
        handle.done(error)


def pieces(
    num: int, found: list[tuple[int, bytes]], nbytes: int = 40
) -> list[CopyTask]:
    def place(number: int, data: memoryview) -> None:
        found.append((number, bytes(data)))

    return [
        CopyTask(
            "unit",
            (Extent(PATH, 5 + 100 * n, nbytes),),
            lambda data, n=n: place(n, data[0]),  # type: ignore[misc]
            Handle(1),
        )
        for n in range(num)
    ]


def copier(drive: Drive, num_threads: int = 1, bounce_bytes: int = 64) -> BounceCopier:
    return BounceCopier(
        drive.submit, alignment=16, bounce_bytes=bounce_bytes, num_threads=num_threads
    )


def test_the_next_is_read_before_the_last_has_come() -> None:
    drive, found = Drive(), list[tuple[int, bytes]]()
    work = pieces(5, found)
    with copier(drive) as threads:
        threads.put(work)
        for number in range(5):
            drive.wait_for(min(5, number + 2))
            assert len(drive.asked) == min(5, number + 2)  # and no more than two
            drive.bring(number)
            work[number].handle.wait()
    expected = [bytes(b % 251 for b in range(o, o + 40)) for o in range(5, 500, 100)]
    assert found == list(enumerate(expected))


def test_each_thread_has_two() -> None:
    drive, found = Drive(), list[tuple[int, bytes]]()
    with copier(drive, num_threads=2) as threads:
        threads.put(pieces(9, found))
        drive.wait_for(4)
        assert len({id(buffer.obj) for _, buffer, _ in drive.asked}) == 4
        for number in range(9):
            drive.wait_for(number + 1)
            drive.bring(number)
    assert sorted(number for number, _ in found) == list(range(9))
    assert len({id(buffer.obj) for _, buffer, _ in drive.asked}) == 4  # used again


def test_a_piece_that_fails_is_the_only_one() -> None:
    drive, found = Drive(), list[tuple[int, bytes]]()
    work = pieces(3, found)
    with copier(drive) as threads:
        threads.put(work)
        drive.wait_for(2)
        drive.bring(0, OSError("gone"))
        drive.bring(1)
        drive.wait_for(3)
        drive.bring(2)
    with pytest.raises(OSError, match="gone"):
        work[0].handle.wait()
    assert [number for number, _ in found] == [1, 2]


def test_what_is_larger_than_a_buffer_gets_one_of_its_own() -> None:
    drive, found = Drive(), list[tuple[int, bytes]]()
    with copier(drive) as threads:
        threads.put(pieces(1, found, nbytes=1000))
        drive.wait_for(1)
        drive.bring(0)
    assert len(found[0][1]) == 1000


def test_closing_does_what_was_put_and_may_be_repeated() -> None:
    drive, found = Drive(), list[tuple[int, bytes]]()
    threads = copier(drive)
    threads.put(pieces(2, found))
    drive.wait_for(2)
    closing = threading.Thread(target=threads.close)
    closing.start()
    drive.bring(0)
    drive.bring(1)
    closing.join()
    threads.close()
    assert len(found) == 2
    assert not any(t.name.startswith("penstock-copy") for t in threading.enumerate())
    with pytest.raises(ClosedError, match="load the model again"):
        threads.put(pieces(1, found))


def test_what_cannot_be_mapped_is_the_pieces_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(copying, "mmap", SimpleNamespace(mmap=fails))
    drive, found = Drive(), list[tuple[int, bytes]]()
    work = pieces(3, found)
    with copier(drive) as threads:
        threads.put(work)
    for piece in work:
        with pytest.raises(OSError, match="no memory"):
            piece.handle.wait()


def test_without_a_thread_nothing_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    drive, found = Drive(), list[tuple[int, bytes]]()
    threads = copier(drive)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fails)
        with pytest.raises(RuntimeError, match="start new thread"):
            threads.put(pieces(1, found))
    with threads:
        work = pieces(2, found)
        threads.put(work)
        drive.wait_for(2)
        drive.bring(0)
        drive.bring(1)
    assert len(found) == 2
