"""What every reader must do, and what the reader of threads does beyond that."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernel_aio
from checkpoints import random_tensor
from penstock.io.checkpoint.header import FileStamp
from penstock.io.errors import (
    CheckpointChangedError,
    CheckpointError,
    ClosedError,
    ReadError,
)
from penstock.io.extent import Extent, aligned
from penstock.io.fallbacks import Fallbacks
from penstock.io.handle import Handle
from penstock.io.readers import libaio_reader as aio
from penstock.io.readers.aiofiles_reader import AiofilesReader
from penstock.io.readers.libaio_reader import LibaioReader
from penstock.io.readers.reader import Reader
from penstock.io.readers.threads import ThreadReader

pytestmark = pytest.mark.usefixtures("no_leaks")

PAGE = 4096


def write(path: Path, nbytes: int, *, seed: int = 0) -> bytes:
    content = random_tensor(torch.uint8, (nbytes,), seed=seed).numpy().tobytes()
    path.write_bytes(content)
    return content


def stamps_of(*paths: Path) -> dict[Path, FileStamp]:
    return {path: FileStamp.of(path.stat()) for path in paths}


def buffer_of(nbytes: int) -> memoryview:
    """Page-aligned memory of `nbytes`, none of it zero."""
    whole = memoryview(mmap.mmap(-1, max(nbytes, 1)))
    whole[:] = b"\xa5" * len(whole)
    return whole[:nbytes]


def read(reader: Reader, extent: Extent) -> bytes:
    """The bytes of `extent`, read by its aligned window as a loader does it."""
    window = aligned(extent, reader.alignment)
    buffer = buffer_of(window.nbytes)
    reader.submit(window, buffer).wait()
    start = extent.offset - window.offset
    return bytes(buffer[start : start + extent.nbytes])


class MakeReader(Protocol):
    """Opens a reader of the files in `stamps`."""

    def __call__(
        self, stamps: Mapping[Path, FileStamp], *, chunk_bytes: int = ...
    ) -> Reader: ...


class ReaderContract:
    """What any reader promises. Subclasses provide `make_reader`."""

    @pytest.fixture
    def make_reader(self) -> MakeReader:
        raise NotImplementedError

    @pytest.mark.parametrize(
        "nbytes", [1, 511, PAGE - 1, PAGE, PAGE + 1, 5 * PAGE, 50_001]
    )
    def test_a_whole_file_is_read_whatever_its_length(
        self, nbytes: int, make_reader: MakeReader, tmp_path: Path
    ) -> None:
        path = tmp_path / "x"
        content = write(path, nbytes)
        with make_reader(stamps_of(path)) as reader:
            assert read(reader, Extent(path, 0, nbytes)) == content

    def test_a_window_may_end_past_the_end_of_the_file(
        self, make_reader: MakeReader, tmp_path: Path
    ) -> None:
        path = tmp_path / "x"
        content = write(path, PAGE + 10)
        buffer = buffer_of(3 * PAGE)
        with make_reader(stamps_of(path)) as reader:
            reader.submit(Extent(path, 0, 3 * PAGE), buffer).wait()
        assert bytes(buffer[: PAGE + 10]) == content

    def test_nothing_is_written_beside_the_extent_in_a_longer_buffer(
        self, make_reader: MakeReader, tmp_path: Path
    ) -> None:
        path = tmp_path / "x"
        content = write(path, 4 * PAGE)
        buffer = buffer_of(5 * PAGE)
        with make_reader(stamps_of(path), chunk_bytes=PAGE) as reader:
            reader.submit(Extent(path, PAGE, 2 * PAGE), buffer[PAGE:]).wait()
        wanted = b"\xa5" * PAGE + content[PAGE : 3 * PAGE] + b"\xa5" * 2 * PAGE
        assert bytes(buffer) == wanted

    def test_an_extent_of_no_bytes_is_done_at_once(
        self, make_reader: MakeReader, tmp_path: Path
    ) -> None:
        path = tmp_path / "x"
        write(path, 10)
        with make_reader(stamps_of(path)) as reader:
            handle = reader.submit(Extent(path, 0, 0), memoryview(b""))
            assert handle.is_done
            handle.wait()
            assert reader.statistics().bytes_read == 0

    def test_chunks_end_up_side_by_side(
        self, make_reader: MakeReader, tmp_path: Path
    ) -> None:
        path = tmp_path / "x"
        content = write(path, 10 * PAGE + 5)
        with make_reader(stamps_of(path), chunk_bytes=PAGE) as reader:
            assert read(reader, Extent(path, 0, len(content))) == content
            assert reader.statistics().num_reads >= 11

    @pytest.mark.parametrize("chunk_bytes", [1, 1000, 5000, 1_000_000])
    def test_chunks_need_not_be_whole_pages(
        self, chunk_bytes: int, make_reader: MakeReader, tmp_path: Path
    ) -> None:
        path = tmp_path / "x"
        content = write(path, 6 * PAGE + 5)
        with make_reader(stamps_of(path), chunk_bytes=chunk_bytes) as reader:
            assert read(reader, Extent(path, 0, len(content))) == content

    def test_many_extents_of_many_files_are_read_at_once(
        self, make_reader: MakeReader, tmp_path: Path
    ) -> None:
        paths = [tmp_path / f"{i}" for i in range(3)]
        contents = [write(p, 9 * PAGE + i, seed=i) for i, p in enumerate(paths)]
        windows = [Extent(p, n * PAGE, 2 * PAGE) for n in range(9) for p in paths]
        with make_reader(stamps_of(*paths)) as reader:
            buffers = [buffer_of(window.nbytes) for window in windows]
            handles: list[Handle] = []
            for window, buffer in zip(windows, buffers, strict=True):
                handles.append(reader.submit(window, buffer))
            for handle in reversed(handles):
                handle.wait()
            for window, buffer in zip(windows, buffers, strict=True):
                content = contents[paths.index(window.path)]
                wanted = content[window.offset : window.end]
                assert bytes(buffer[: len(wanted)]) == wanted

    def test_an_urgent_read_gives_the_same_bytes(
        self, make_reader: MakeReader, tmp_path: Path
    ) -> None:
        path = tmp_path / "x"
        content = write(path, 5 * PAGE)
        buffers = [buffer_of(5 * PAGE), buffer_of(5 * PAGE)]
        with make_reader(stamps_of(path), chunk_bytes=PAGE) as reader:
            handles = [
                reader.submit(Extent(path, 0, 5 * PAGE), buffer, urgent=urgent)
                for buffer, urgent in zip(buffers, [False, True], strict=True)
            ]
            for handle in handles:
                handle.wait()
        assert bytes(buffers[0]) == bytes(buffers[1]) == content

    def test_bytes_and_reads_are_counted(
        self, make_reader: MakeReader, tmp_path: Path
    ) -> None:
        path = tmp_path / "x"
        write(path, 2 * PAGE + 7)
        with make_reader(stamps_of(path)) as reader:
            before = reader.statistics()
            assert (before.bytes_read, before.num_reads) == (0, 0)
            read(reader, Extent(path, 0, 2 * PAGE + 7))
            read(reader, Extent(path, PAGE, 10))
            after = reader.statistics()
        assert after.bytes_read == 2 * PAGE + 7 + PAGE
        assert after.num_reads == 2

    def test_a_handle_can_be_waited_for_again(
        self, make_reader: MakeReader, tmp_path: Path
    ) -> None:
        path = tmp_path / "x"
        write(path, PAGE)
        with make_reader(stamps_of(path)) as reader:
            handle = reader.submit(Extent(path, 0, PAGE), buffer_of(PAGE))
            handle.wait()
            handle.wait()
            handle.wait_quietly()
            assert handle.is_done

    @pytest.mark.parametrize("when", ["before_the_first_read", "between_two"])
    @pytest.mark.parametrize("keep", [0, PAGE, PAGE + 3])
    def test_a_file_that_became_shorter_is_an_error(
        self, keep: int, when: str, make_reader: MakeReader, tmp_path: Path
    ) -> None:
        path = tmp_path / "x"
        write(path, 3 * PAGE)
        whole = Extent(path, 0, 3 * PAGE)
        with make_reader(stamps_of(path)) as reader:
            if when == "between_two":
                read(reader, whole)
            os.truncate(path, keep)
            with pytest.raises(CheckpointChangedError, match="load it again") as caught:
                read(reader, whole)
            assert str(path) in str(caught.value)

    @pytest.mark.parametrize("when", ["before_the_first_read", "between_two"])
    @pytest.mark.parametrize("how", ["longer", "overwritten"])
    def test_a_file_that_was_changed_is_an_error(
        self, how: str, when: str, make_reader: MakeReader, tmp_path: Path
    ) -> None:
        path = tmp_path / "x"
        content = write(path, 3 * PAGE)
        stamps = stamps_of(path)
        first = Extent(path, 0, PAGE)
        with make_reader(stamps) as reader:
            if when == "between_two":
                read(reader, first)
            with path.open("r+b") as file:
                if how == "longer":
                    file.seek(0, os.SEEK_END)
                    file.write(b"more")
                else:
                    file.write(bytes(byte ^ 1 for byte in content))
            touch_later(path, stamps[path])
            with pytest.raises(CheckpointChangedError, match="load it again") as caught:
                read(reader, first)
            assert str(path) in str(caught.value)

    def test_a_file_that_was_replaced_after_it_was_opened_is_read_as_it_was(
        self, make_reader: MakeReader, tmp_path: Path
    ) -> None:
        path = tmp_path / "x"
        content = write(path, 3 * PAGE)
        with make_reader(stamps_of(path)) as reader:
            read(reader, Extent(path, 0, PAGE))
            write(tmp_path / "new", 3 * PAGE, seed=1)
            os.replace(tmp_path / "new", path)
            assert read(reader, Extent(path, 0, 3 * PAGE)) == content

    def test_a_file_that_is_gone_is_an_error(
        self, make_reader: MakeReader, tmp_path: Path
    ) -> None:
        path = tmp_path / "x"
        write(path, PAGE)
        stamps = stamps_of(path)
        path.unlink()
        with (
            make_reader(stamps) as reader,
            pytest.raises(CheckpointError, match="No such file") as caught,
        ):
            read(reader, Extent(path, 0, PAGE))
        assert str(path) in str(caught.value)

    def test_a_failed_read_does_not_spoil_the_next(
        self, make_reader: MakeReader, tmp_path: Path
    ) -> None:
        paths = [tmp_path / "gone", tmp_path / "there"]
        contents = [write(path, PAGE) for path in paths]
        stamps = stamps_of(*paths)
        paths[0].unlink()
        with make_reader(stamps) as reader:
            for _ in range(8):
                with pytest.raises(CheckpointError):
                    read(reader, Extent(paths[0], 0, PAGE))
            assert read(reader, Extent(paths[1], 0, PAGE)) == contents[1]

    def test_an_error_does_not_keep_the_buffer(
        self, make_reader: MakeReader, tmp_path: Path
    ) -> None:
        path = tmp_path / "x"
        write(path, PAGE)
        stamps = stamps_of(path)
        path.unlink()
        memory = mmap.mmap(-1, PAGE)
        with make_reader(stamps) as reader:
            handle = reader.submit(Extent(path, 0, PAGE), memoryview(memory))
            with pytest.raises(CheckpointError) as caught:
                handle.wait()
        memory.close()  # BufferError, if anybody still had a view of it
        assert "No such file" in str(caught.value)

    def test_a_closed_reader_says_so(
        self, make_reader: MakeReader, tmp_path: Path
    ) -> None:
        path = tmp_path / "x"
        write(path, PAGE)
        reader = make_reader(stamps_of(path))
        read(reader, Extent(path, 0, PAGE))
        reader.close()
        reader.close()
        with pytest.raises(ClosedError, match="load the model again"):
            reader.submit(Extent(path, 0, PAGE), buffer_of(PAGE))
        assert reader.statistics().bytes_read == PAGE

    def test_closing_finishes_what_is_under_way(
        self, make_reader: MakeReader, tmp_path: Path
    ) -> None:
        path = tmp_path / "x"
        content = write(path, 64 * PAGE)
        buffer = buffer_of(64 * PAGE)
        reader = make_reader(stamps_of(path), chunk_bytes=PAGE)
        handle = reader.submit(Extent(path, 0, 64 * PAGE), buffer)
        reader.close()
        assert handle.is_done
        assert bytes(buffer) == content

    def test_a_reader_is_closed_by_an_error_in_its_block(
        self, make_reader: MakeReader
    ) -> None:
        with pytest.raises(KeyError), make_reader({}) as reader:
            raise KeyError
        with pytest.raises(ClosedError):
            reader.submit(Extent(Path("x"), 0, 0), memoryview(b""))


def touch_later(path: Path, stamp: FileStamp) -> None:
    """Makes the change of `path` seen even by a clock that did not tick meanwhile."""
    os.utime(path, ns=(stamp.mtime_ns, stamp.mtime_ns + 1))


class TestThreadReader(ReaderContract):
    """Past the page cache, where the file system can."""

    direct = True

    @pytest.fixture
    def make_reader(self) -> MakeReader:
        def make(
            stamps: Mapping[Path, FileStamp], *, chunk_bytes: int = 1 << 20
        ) -> Reader:
            return ThreadReader(
                stamps,
                num_threads=3,
                chunk_bytes=chunk_bytes,
                direct=self.direct,
                fallbacks=Fallbacks(),
            )

        return make


class TestBufferedThreadReader(TestThreadReader):
    """Through the page cache."""

    direct = False


class TestAiofilesReader(ReaderContract):
    @pytest.fixture
    def make_reader(self) -> MakeReader:
        def make(
            stamps: Mapping[Path, FileStamp], *, chunk_bytes: int = 1 << 20
        ) -> Reader:
            return AiofilesReader(stamps, num_tasks=3, chunk_bytes=chunk_bytes)

        return make


@pytest.mark.skipif(aio.why_not() is not None, reason=kernel_aio.why_skipped())
class TestLibaioReader(ReaderContract):
    direct = True

    @pytest.fixture(params=kernel_aio.packages(), ids=lambda package: package.__name__)
    def make_reader(
        self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
    ) -> MakeReader:
        monkeypatch.setitem(sys.modules, "libaio", request.param)

        def make(
            stamps: Mapping[Path, FileStamp], *, chunk_bytes: int = 1 << 20
        ) -> Reader:
            return LibaioReader(
                stamps,
                depth=4,
                chunk_bytes=chunk_bytes,
                direct=self.direct,
                fallbacks=Fallbacks(),
            )

        return make


class TestBufferedLibaioReader(TestLibaioReader):
    """Where the kernel reads at once, within the submission."""

    direct = False


def open_threads(
    stamps: Mapping[Path, FileStamp],
    *,
    direct: bool = True,
    num_threads: int = 2,
    fallbacks: Fallbacks | None = None,
) -> ThreadReader:
    return ThreadReader(
        stamps,
        num_threads=num_threads,
        chunk_bytes=2 * PAGE,
        direct=direct,
        fallbacks=fallbacks or Fallbacks(),
    )


@settings(max_examples=30)
@given(
    nbytes=st.integers(1, 6 * PAGE),
    places=st.lists(
        st.tuples(st.integers(0, 6 * PAGE), st.integers(0, 3 * PAGE)),
        min_size=1,
        max_size=6,
    ),
)
def test_direct_and_buffered_reads_give_the_same_bytes(
    nbytes: int,
    places: Sequence[tuple[int, int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.getbasetemp() / "direct_and_buffered"
    content = write(path, nbytes, seed=nbytes)
    stamps = stamps_of(path)
    with open_threads(stamps) as direct, open_threads(stamps, direct=False) as cached:
        for offset, length in places:
            extent = Extent(path, min(offset, nbytes), min(length, nbytes - offset))
            if extent.nbytes > 0:
                wanted = content[extent.offset : extent.end]
                assert read(direct, extent) == read(cached, extent) == wanted


def test_where_the_file_system_can_reads_are_direct(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write(path, PAGE)
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no O_DIRECT")
    fallbacks = Fallbacks()
    with open_threads(stamps_of(path), fallbacks=fallbacks) as reader:
        read(reader, Extent(path, 0, PAGE))
        assert reader.statistics().is_direct
    assert [*fallbacks] == []


def test_statistics_may_be_asked_for_while_files_are_opened(
    tmp_path: Path,
) -> None:
    paths = [tmp_path / str(n) for n in range(300)]
    for path in paths:
        path.write_bytes(b"x")
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with open_threads(stamps_of(*paths)) as reader:
            opening = threading.Thread(
                target=lambda: [read(reader, Extent(path, 0, 1)) for path in paths]
            )
            opening.start()
            while opening.is_alive():
                reader.statistics()
            opening.join()
    finally:
        sys.setswitchinterval(before)


def test_buffered_reads_that_were_asked_for_are_no_fallback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x"
    write(path, PAGE)
    fallbacks = Fallbacks()
    with open_threads(stamps_of(path), direct=False, fallbacks=fallbacks) as reader:
        read(reader, Extent(path, 0, PAGE))
        assert not reader.statistics().is_direct
    assert [*fallbacks] == []
    assert not caplog.records


@dataclass
class FakeSystem:
    """The system's `open` and `preadv`, recorded, failing where it is told to."""

    refuse_direct_open: int = 0
    """The errno of every open with O_DIRECT."""
    refuse_direct_read: int = 0
    """The errno of every read from a descriptor with O_DIRECT."""
    fail_read_at: dict[int, int] = field(default_factory=dict)
    """errno by file offset, of a longer read than the one that probes."""
    longest_read: int = 1 << 40
    gate: threading.Event | None = None
    """Reads wait for it, once they are recorded."""
    has_started: threading.Event = field(default_factory=threading.Event)
    opened: list[tuple[str, int]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    _open: Callable[..., int] = os.open
    _preadv: Callable[..., int] = os.preadv
    _direct: set[int] = field(default_factory=set)

    def open(self, path: str | Path, flags: int, *rest: int) -> int:
        self.opened.append((str(path), flags))
        if flags & os.O_DIRECT and self.refuse_direct_open:
            raise OSError(self.refuse_direct_open, "refused")
        descriptor = self._open(path, flags, *rest)
        self._direct -= {descriptor}
        self._direct |= {descriptor} if flags & os.O_DIRECT else set()
        return descriptor

    def preadv(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if descriptor in self._direct and self.refuse_direct_read:
            raise OSError(self.refuse_direct_read, os.strerror(self.refuse_direct_read))
        is_probe = isinstance(buffers[0], mmap.mmap)
        if not is_probe:
            self.offsets.append(offset)
            self.has_started.set()
            if self.gate is not None:
                self.gate.wait()
            if offset in self.fail_read_at:
                number = self.fail_read_at[offset]
                raise OSError(number, os.strerror(number))
            buffers = [buffers[0][: self.longest_read]]
        return self._preadv(descriptor, buffers, offset)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "open", self.open)
        monkeypatch.setattr(os, "preadv", self.preadv)


@pytest.mark.parametrize(
    "system",
    [
        pytest.param(FakeSystem(refuse_direct_open=errno.EINVAL), id="at_open"),
        pytest.param(FakeSystem(refuse_direct_read=errno.EINVAL), id="at_the_read"),
    ],
)
def test_a_refused_direct_read_falls_back_and_says_so_once(
    system: FakeSystem,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    paths = [tmp_path / "x", tmp_path / "y"]
    contents = [write(path, PAGE + i) for i, path in enumerate(paths)]
    system.install(monkeypatch)
    fallbacks = Fallbacks()
    with open_threads(stamps_of(*paths), fallbacks=fallbacks) as reader:
        for path, content in zip(paths, contents, strict=True):
            assert read(reader, Extent(path, 0, len(content))) == content
        assert not reader.statistics().is_direct
    (said,) = fallbacks
    assert str(tmp_path) in said
    assert [r.message for r in caplog.records] == [said]
    assert caplog.records[0].levelno == logging.WARNING


def test_another_error_at_open_is_no_fallback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    write(path, PAGE)
    FakeSystem(refuse_direct_open=errno.EACCES).install(monkeypatch)
    fallbacks = Fallbacks()
    with (
        open_threads(stamps_of(path), fallbacks=fallbacks) as reader,
        pytest.raises(CheckpointError, match="cannot open"),
    ):
        read(reader, Extent(path, 0, PAGE))
    assert [*fallbacks] == []


def test_without_o_direct_in_python_reads_go_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    content = write(path, PAGE)
    monkeypatch.delattr(os, "O_DIRECT")
    fallbacks = Fallbacks()
    with open_threads(stamps_of(path), fallbacks=fallbacks) as reader:
        assert read(reader, Extent(path, 0, PAGE)) == content
    assert len([*fallbacks]) == 1


@pytest.mark.parametrize("direct", [True, False])
def test_an_error_of_the_device_names_file_and_offset(
    direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    content = write(path, 8 * PAGE)
    FakeSystem(fail_read_at={4 * PAGE: errno.EIO}).install(monkeypatch)
    with open_threads(stamps_of(path), direct=direct) as reader:
        with pytest.raises(ReadError, match="Input/output error") as caught:
            read(reader, Extent(path, 0, 8 * PAGE))
        assert str(path) in str(caught.value)
        assert str(4 * PAGE) in str(caught.value)
        with pytest.raises(ReadError):  # it is still broken
            read(reader, Extent(path, 4 * PAGE, PAGE))
        assert read(reader, Extent(path, 0, PAGE)) == content[:PAGE]


def test_short_reads_are_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    content = write(path, 4 * PAGE + 100)
    system = FakeSystem(longest_read=PAGE)
    system.install(monkeypatch)
    with open_threads(stamps_of(path), num_threads=1) as reader:
        assert read(reader, Extent(path, 0, len(content))) == content
        assert reader.statistics().num_reads == 5
    assert system.offsets == [0, PAGE, 2 * PAGE, 3 * PAGE, 4 * PAGE]


def test_what_is_urgent_is_read_before_what_was_asked_for_earlier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    content = write(path, 8 * PAGE)
    system = FakeSystem(gate=threading.Event())
    system.install(monkeypatch)
    assert system.gate is not None
    buffer = buffer_of(8 * PAGE)
    handles = []
    with open_threads(stamps_of(path), num_threads=1) as reader:
        for page, urgent in [(0, False), (1, False), (2, False), (5, True), (4, True)]:
            extent = Extent(path, page * PAGE, PAGE)
            part = buffer[extent.offset : extent.end]
            handles.append(reader.submit(extent, part, urgent=urgent))
            system.has_started.wait()  # the first is under way before the second comes
        system.gate.set()
        for handle in handles:
            handle.wait()
    assert [offset // PAGE for offset in system.offsets] == [0, 5, 4, 1, 2]
    assert bytes(buffer[: 3 * PAGE]) == content[: 3 * PAGE]


def test_each_file_is_opened_once_and_only_when_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / name for name in "xyz"]
    for path in paths:
        write(path, 4 * PAGE)
    system = FakeSystem()
    system.install(monkeypatch)
    with open_threads(stamps_of(*paths)) as reader:
        for page in range(4):
            for path in paths[:2]:
                read(reader, Extent(path, page * PAGE, PAGE))
    assert [path for path, _ in system.opened] == [str(path) for path in paths[:2]]


def test_reading_happens_in_threads_of_that_name(tmp_path: Path) -> None:
    with open_threads({}, num_threads=3) as reader:
        names = {t.name for t in threading.enumerate()}
        assert {f"penstock-read-{i}" for i in range(3)} <= names
        assert "3 threads" in repr(reader)
    names = {t.name for t in threading.enumerate()}
    assert not {f"penstock-read-{i}" for i in range(3)} & names


def test_a_buffer_that_is_too_short_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write(path, 2 * PAGE)
    with (
        open_threads(stamps_of(path)) as reader,
        pytest.raises(AssertionError, match="shorter than the extent"),
    ):
        reader.submit(Extent(path, 0, 2 * PAGE), buffer_of(PAGE))


class TestHandle:
    """The completion that all readers hand out."""

    def test_it_is_done_when_all_parts_are(self) -> None:
        handle = Handle(2)
        handle.done()
        assert not handle.is_done
        handle.done()
        assert handle.is_done
        handle.wait()

    def test_of_several_errors_the_first_is_raised_each_time(self) -> None:
        handle = Handle(3)
        handle.done(ReadError("first"))
        handle.done()
        handle.done(ReadError("second"))
        for _ in range(2):
            with pytest.raises(ReadError, match="first"):
                handle.wait()

    def test_a_quiet_wait_does_not_raise(self) -> None:
        handle = Handle(1)
        handle.done(ReadError("failed"))
        handle.wait_quietly()
