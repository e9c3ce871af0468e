"""The reader that fills a GPU's memory, on a fake cuFile that fills the CPU's."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from test_readers import PAGE, MakeReader, ReaderContract, stamps_of, write

from penstock.io.checkpoint.header import FileStamp
from penstock.io.devices.cufile import CuFile
from penstock.io.errors import ReadError
from penstock.io.extent import Extent
from penstock.io.fallbacks import Fallbacks
from penstock.io.handle import Handle
from penstock.io.readers import gds
from penstock.io.readers.gds import GdsReader, probe, why_not
from penstock.io.readers.reader import Reader, ReaderStatistics

pytestmark = pytest.mark.usefixtures("no_leaks")

CPU = torch.device("cpu")


@dataclass
class FakeCuFile:
    """Opens files as cuFile does and reads them with the system, recorded, failing
    where it is told to."""

    refuse_open: Exception | None = None
    fail_read_at: dict[int, Exception] = field(default_factory=dict)
    longest_read: int = 1 << 40
    flip_bits: bool = False
    opened: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    num_open: int = 0

    def open(self, path: str) -> FakeDeviceFile:
        self.opened.append(path)
        if self.refuse_open is not None:
            raise self.refuse_open
        self.num_open += 1
        return FakeDeviceFile(self, os.open(path, os.O_RDONLY))


@dataclass
class FakeDeviceFile:
    system: FakeCuFile
    descriptor: int

    def read(self, target: torch.Tensor, offset: int) -> int:
        self.system.offsets.append(offset)
        if offset in self.system.fail_read_at:
            raise self.system.fail_read_at[offset]
        part = target[: self.system.longest_read]
        count = os.preadv(self.descriptor, [part.numpy().data], offset)
        if self.system.flip_bits:
            part.bitwise_not_()
        return count

    def close(self) -> None:
        os.close(self.descriptor)
        self.system.num_open -= 1


def open_gds(
    stamps: Mapping[Path, FileStamp],
    system: FakeCuFile,
    *,
    num_threads: int = 3,
    chunk_bytes: int = 2 * PAGE,
) -> GdsReader:
    return GdsReader(
        stamps,
        num_threads=num_threads,
        chunk_bytes=chunk_bytes,
        open_file=system.open,
        fallbacks=Fallbacks(),
    )


class ByMemory:
    """A GdsReader that is given memory as other readers are."""

    def __init__(self, inner: GdsReader) -> None:
        self._inner = inner
        self.name = inner.name
        self.alignment = inner.alignment

    def submit(
        self, extent: Extent, buffer: memoryview, *, urgent: bool = False
    ) -> Handle:
        if len(buffer):
            target = torch.frombuffer(buffer, dtype=torch.uint8)
        else:
            target = torch.empty(0, dtype=torch.uint8)
        return self._inner.submit(extent, target, urgent=urgent)

    def statistics(self) -> ReaderStatistics:
        return self._inner.statistics()

    def close(self) -> None:
        self._inner.close()

    def __enter__(self) -> ByMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TestGdsReader(ReaderContract):
    @pytest.fixture
    def make_reader(self) -> MakeReader:
        def make(
            stamps: Mapping[Path, FileStamp], *, chunk_bytes: int = 1 << 20
        ) -> Reader:
            reader = open_gds(stamps, FakeCuFile(), chunk_bytes=chunk_bytes)
            return ByMemory(reader)

        return make


def test_a_part_of_a_larger_tensor_is_filled_in_place(tmp_path: Path) -> None:
    path = tmp_path / "x"
    content = write(path, 6 * PAGE)
    whole = torch.zeros(8 * PAGE, dtype=torch.uint8)
    with open_gds(stamps_of(path), FakeCuFile()) as reader:
        extent = Extent(path, PAGE, 4 * PAGE)
        reader.submit(extent, whole[2 * PAGE : 7 * PAGE]).wait()
        assert "3 threads, 1 files" in repr(reader)
    wanted = bytes(2 * PAGE) + content[PAGE : 5 * PAGE] + bytes(2 * PAGE)
    assert whole.numpy().tobytes() == wanted


def test_each_file_is_registered_once_and_closed(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "xyz"]
    for path in paths:
        write(path, 4 * PAGE)
    system = FakeCuFile()
    target = torch.empty(PAGE, dtype=torch.uint8)
    with open_gds(stamps_of(*paths), system) as reader:
        for page in range(4):
            for path in paths[:2]:
                reader.submit(Extent(path, page * PAGE, PAGE), target).wait()
        assert system.num_open == len(system.opened) == 2
    assert system.num_open == 0


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, os.strerror(errno.EIO)),
        OSError(errno.EIO, "cuFile's error 5030"),
        RuntimeError("CUDA is gone"),
    ],
)
def test_an_error_names_file_offset_and_cause(error: Exception, tmp_path: Path) -> None:
    path = tmp_path / "x"
    content = write(path, 8 * PAGE)
    target = torch.empty(8 * PAGE, dtype=torch.uint8)
    system = FakeCuFile(fail_read_at={4 * PAGE: error})
    with open_gds(stamps_of(path), system, chunk_bytes=4 * PAGE) as reader:
        with pytest.raises(ReadError) as caught:
            reader.submit(Extent(path, 0, 8 * PAGE), target).wait()
        reader.submit(Extent(path, 0, PAGE), target).wait()
    assert f"at {4 * PAGE} of {path}" in str(caught.value)
    assert (getattr(error, "strerror", None) or str(error)) in str(caught.value)
    assert target[:PAGE].numpy().tobytes() == content[:PAGE]


def test_a_file_that_cannot_be_registered_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write(path, PAGE)
    system = FakeCuFile(refuse_open=RuntimeError("cuFileHandleRegister failed"))
    with (
        open_gds(stamps_of(path), system) as reader,
        pytest.raises(ReadError, match="cuFileHandleRegister failed"),
    ):
        reader.submit(
            Extent(path, 0, PAGE), torch.empty(PAGE, dtype=torch.uint8)
        ).wait()


def test_short_reads_are_completed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    content = write(path, 4 * PAGE + 100)
    target = torch.empty(5 * PAGE, dtype=torch.uint8)
    system = FakeCuFile(longest_read=PAGE)
    with open_gds(
        stamps_of(path), system, num_threads=1, chunk_bytes=1 << 20
    ) as reader:
        reader.submit(Extent(path, 0, 5 * PAGE), target).wait()
    assert target[: len(content)].numpy().tobytes() == content
    assert system.offsets == [0, PAGE, 2 * PAGE, 3 * PAGE, 4 * PAGE]


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the file system of the test's own files allows."""
    monkeypatch.setattr(gds, "reads_directly", lambda path: True)


@pytest.mark.usefixtures("direct")
def test_what_can_be_read_is_found_out_by_reading(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write(path, 100)
    system = FakeCuFile()
    assert probe(CPU, path, open_file=system.open) is None
    assert system.offsets == [0]
    assert system.num_open == 0


@pytest.mark.usefixtures("direct")
@pytest.mark.parametrize(
    ("system", "reason"),
    [
        (FakeCuFile(refuse_open=RuntimeError("is not supported")), "is not supported"),
        (FakeCuFile(refuse_open=OSError(22, "Invalid argument")), "Invalid argument"),
        (FakeCuFile(fail_read_at={0: OSError(5, "cuFile's error 5")}), "error 5"),
        (FakeCuFile(flip_bits=True), "other bytes"),
        (FakeCuFile(longest_read=10), "other bytes"),
    ],
)
def test_what_goes_wrong_is_a_sentence(
    system: FakeCuFile, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "x"
    write(path, 2 * PAGE)
    found = probe(CPU, path, open_file=system.open)
    assert found is not None
    assert reason in found
    assert str(tmp_path) in found
    assert system.num_open == 0


def test_where_direct_reads_are_refused_nothing_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gds, "reads_directly", lambda path: False)
    system = FakeCuFile()
    found = probe(CPU, tmp_path / "x", open_file=system.open)
    assert found is not None
    assert "no O_DIRECT" in found
    assert system.opened == []


def test_the_cpu_is_no_gpu(tmp_path: Path) -> None:
    found = why_not(CPU, tmp_path / "x")
    assert found is not None
    assert "the device is cpu" in found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_filled_or_it_is_said_why_not(tmp_path: Path) -> None:
    path = tmp_path / "x"
    content = write(path, 9 * PAGE + 5)
    device = torch.device("cuda")
    if (reason := why_not(device, path)) is not None:
        pytest.skip(reason)
    target = torch.zeros(10 * PAGE, dtype=torch.uint8, device=device)
    reader = GdsReader(
        stamps_of(path),
        num_threads=2,
        chunk_bytes=2 * PAGE,
        open_file=CuFile,
        fallbacks=Fallbacks(),
    )
    with reader:
        reader.submit(Extent(path, 0, 10 * PAGE), target).wait()
    assert target[: len(content)].cpu().numpy().tobytes() == content
