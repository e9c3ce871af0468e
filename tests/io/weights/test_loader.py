"""Units loaded from real files by real readers are what safetensors itself loads."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import re
import resource
import tempfile
import threading
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from checkpoints import random_floats, random_tensor, same_bits
from conftest import TinyCheckpoint, mapped_bytes
from penstock.io.checkpoint.header import FileStamp
from penstock.io.checkpoint.index import SINGLE_FILE, Checkpoint, open_checkpoint
from penstock.io.errors import (
    CheckpointChangedError,
    ClosedError,
    DoesNotFitError,
    PenstockError,
    ReadError,
)
from penstock.io.extent import Extent
from penstock.io.fallbacks import Fallbacks
from penstock.io.handle import Handle
from penstock.io.memory.arena import Arena
from penstock.io.readers import libaio_reader as aio
from penstock.io.readers.aiofiles_reader import AiofilesReader
from penstock.io.readers.libaio_reader import LibaioReader
from penstock.io.readers.reader import Reader
from penstock.io.readers.threads import ThreadReader
from penstock.io.weights.layout import TENSOR_ALIGNMENT, Layout, Placed, layout
from penstock.io.weights.loader import Loader, UnitLoad
from penstock.io.weights.recipe import Recipe, TensorSlice, View, computed, plain
from recipes import Example, examples, make, write_packed

pytestmark = pytest.mark.usefixtures("no_leaks")

PAGE = 4096


@dataclass(frozen=True)
class Rig:
    """A loader whose arena holds all of its units, one after the other."""

    layouts: Sequence[Layout]
    offsets: Sequence[int]
    arena: Arena
    loader: Loader
    reader: Reader

    def start(self) -> list[UnitLoad]:
        return [self.loader.load(i, at) for i, at in enumerate(self.offsets)]

    def load(self) -> dict[str, torch.Tensor]:
        """Loads all units at once, and copies their tensors."""
        for load in self.start():
            load.wait()
            assert load.is_done
        return {
            placed.name: self._tensor(offset, placed)
            for plan, offset in zip(self.layouts, self.offsets, strict=True)
            for placed in plan.tensors
        }

    def fill(self, byte: int) -> None:
        """Makes every byte of the arena wrong."""
        self.arena.view(0, self.arena.nbytes)[:] = bytes([byte]) * self.arena.nbytes

    def _tensor(self, offset: int, placed: Placed) -> torch.Tensor:
        nbytes = torch.Size(placed.shape).numel() * placed.dtype.itemsize
        content = bytearray(self.arena.view(offset + placed.offset, nbytes))
        empty = torch.empty(placed.shape, dtype=placed.dtype)
        if not content:
            return empty
        return torch.frombuffer(content, dtype=placed.dtype).view(placed.shape)


READERS = ("threads", "aiofiles", *(["libaio"] if aio.why_not() is None else []))


def open_reader(
    name: str, stamps: Mapping[Path, FileStamp], chunk_bytes: int, direct: bool
) -> Reader:
    if name == "aiofiles":
        return AiofilesReader(stamps, num_tasks=2, chunk_bytes=chunk_bytes)
    if name == "libaio":
        return LibaioReader(
            stamps,
            depth=3,
            chunk_bytes=chunk_bytes,
            direct=direct,
            fallbacks=Fallbacks(),
        )
    return ThreadReader(
        stamps,
        num_threads=2,
        chunk_bytes=chunk_bytes,
        direct=direct,
        fallbacks=Fallbacks(),
    )


@contextmanager
def opened(
    checkpoint: Checkpoint,
    *units: Sequence[Recipe],
    bounce_bytes: int = 1 << 20,
    max_gap_bytes: int = 1 << 16,
    direct: bool = True,
    chunk_bytes: int = 1 << 20,
    reader: str = "threads",
    memory_alignment: int = PAGE,
) -> Iterator[Rig]:
    layouts, offsets, position = [], [], 0
    for index, unit in enumerate(units):
        plan = layout(
            f"unit {index}",
            unit,
            alignment=PAGE,
            memory_alignment=memory_alignment,
            tensor_alignment=TENSOR_ALIGNMENT,
            max_gap_bytes=max_gap_bytes,
        )
        layouts.append(plan)
        offsets.append(position)
        position += plan.nbytes
    with (
        Arena(position) as arena,
        open_reader(reader, checkpoint.stamps, chunk_bytes, direct) as opened_reader,
    ):
        loader = Loader(layouts, arena, opened_reader, bounce_bytes=bounce_bytes)
        try:
            yield Rig(layouts, offsets, arena, loader, opened_reader)
        finally:
            loader.close()


@pytest.mark.slow
@settings(max_examples=30)
@given(
    example=examples(max_side=90),
    split=st.integers(0, 5),
    bounce_bytes=st.sampled_from([700, PAGE, 1 << 20]),
    max_gap_bytes=st.sampled_from([0, PAGE, 1 << 18]),
    chunk_bytes=st.sampled_from([PAGE, 3 * PAGE, 1 << 20]),
    direct=st.booleans(),
    reader=st.sampled_from(READERS),
)
def test_every_parameter_is_what_safetensors_loads(
    example: Example,
    reader: str,
    split: int,
    bounce_bytes: int,
    max_gap_bytes: int,
    chunk_bytes: int,
    direct: bool,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = make(example, Path(folder))
        units = [made.recipes[:split], made.recipes[split:]]
        with opened(
            made.checkpoint,
            *units,
            bounce_bytes=bounce_bytes,
            max_gap_bytes=max_gap_bytes,
            reader=reader,
            chunk_bytes=chunk_bytes,
            direct=direct,
        ) as rig:
            for byte in (0x00, 0xFF):  # whatever stood there before
                rig.fill(byte)
                tensors = rig.load()
                for name, wanted in made.wanted.items():
                    assert same_bits(tensors[name], wanted), name


SHAPES = {
    "a": (torch.bfloat16, (60, 512)),
    "b": (torch.bfloat16, (511, 512)),
    "c": (torch.float32, (7,)),
    "d": (torch.int64, (33, 3)),
}


def plain_recipes(
    checkpoint: Checkpoint, dtype: torch.dtype | None = None
) -> list[Recipe]:
    return [
        plain(entry, name=name, dtype=dtype or entry.dtype)
        for name, entry in checkpoint.entries.items()
    ]


def loaded_by_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("num_shards", [1, 3])
def test_units_that_lie_as_they_are_needed_are_never_copied(
    num_shards: int, tiny_checkpoint: TinyCheckpoint
) -> None:
    folder = tiny_checkpoint(SHAPES, num_shards=num_shards)
    checkpoint = open_checkpoint(folder)
    with opened(checkpoint, plain_recipes(checkpoint)) as rig:
        tensors = rig.load()
        statistics = rig.loader.statistics()
        assert not any(
            t.name.startswith("penstock-copy") for t in threading.enumerate()
        )
    for name, wanted in loaded_by_safetensors(folder).items():
        assert same_bits(tensors[name], wanted)
    assert statistics.bytes_copied == 0
    assert statistics.bytes_loaded == checkpoint.num_bytes
    assert statistics.num_loads == 1


@pytest.mark.parametrize("bounce_bytes", [1000, PAGE, 50_000, 1 << 20])
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float64, torch.float32),
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.int32, torch.float32),
    ],
    ids=str,
)
def test_a_cast_is_torchs_own_however_it_is_cut(
    stored: torch.dtype, dtype: torch.dtype, bounce_bytes: int, tmp_path: Path
) -> None:
    tensor = random_floats(torch.float32, (171, 513)).mul_(100).to(stored)
    tensors = {"other": random_tensor(torch.uint8, (77,)), "it": tensor}
    write_packed(tmp_path / SINGLE_FILE, tensors)
    checkpoint = open_checkpoint(tmp_path)
    recipe = plain(checkpoint.entries["it"], name="it", dtype=dtype)
    with opened(checkpoint, [recipe], bounce_bytes=bounce_bytes) as rig:
        assert same_bits(rig.load()["it"], tensor.to(dtype))
        statistics = rig.loader.statistics()
        rig.fill(7)
        with torch.inference_mode():  # of who asks, not of who casts
            again = rig.start()
        for load in again:
            load.wait()
        assert same_bits(rig.load()["it"], tensor.to(dtype))
    nbytes = tensor.numel() * stored.itemsize
    assert statistics.bytes_copied == statistics.bytes_loaded == nbytes


class RecordingReader(ThreadReader):
    """A reader that keeps what was asked of it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(
            checkpoint.stamps,
            num_threads=2,
            chunk_bytes=1 << 20,
            direct=True,
            fallbacks=Fallbacks(),
        )
        self.asked: list[Extent] = []

    def submit(
        self, extent: Extent, buffer: memoryview, *, urgent: bool = False
    ) -> Handle:
        self.asked.append(extent)
        return super().submit(extent, buffer, urgent=urgent)


@pytest.mark.parametrize("kind", ["whole", "columns"])
@pytest.mark.parametrize("bounce_bytes", [PAGE, 5 * PAGE])
def test_a_copy_takes_no_more_memory_than_its_bounce_buffer(
    bounce_bytes: int, kind: str, tmp_path: Path
) -> None:
    stored = random_floats(torch.float32, (300, 256))
    write_packed(tmp_path / SINGLE_FILE, {"it": stored}, data_start=PAGE + 100)
    checkpoint = open_checkpoint(tmp_path)
    entry = checkpoint.entries["it"]
    recipe = plain(entry, name="it", dtype=torch.bfloat16)
    if kind == "columns":  # of a parameter twice as wide
        target = View.of(torch.empty((300, 512), device="meta")[:, 256:])
        piece = TensorSlice(entry, View.whole((300, 256)), target)
        recipe = Recipe("it", (300, 512), torch.bfloat16, (piece,))
    plan = layout(
        "unit",
        [recipe],
        alignment=PAGE,
        memory_alignment=PAGE,
        tensor_alignment=TENSOR_ALIGNMENT,
        max_gap_bytes=0,
    )
    with Arena(plan.nbytes) as arena, RecordingReader(checkpoint) as reader:
        loader = Loader([plan], arena, reader, bounce_bytes=bounce_bytes)
        loader.load(0, 0).wait()
        loader.close()
    assert sum(extent.nbytes for extent in reader.asked) >= entry.nbytes
    assert max(e.nbytes for e in reader.asked) <= bounce_bytes + 2 * PAGE


@pytest.mark.parametrize("rows", [4, 5, 64, 130])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("data_start", [PAGE, PAGE + 2, 2 * PAGE - 2])
def test_stacked_experts_are_right_on_page_borders_and_off_them(
    rows: int, dtype: torch.dtype, data_start: int, tmp_path: Path
) -> None:
    experts = [random_tensor(torch.bfloat16, (rows, 512), seed=i) for i in range(6)]
    if dtype is torch.float32:
        experts = [random_floats(torch.bfloat16, (rows, 512), seed=i) for i in range(6)]
    named = {f"{i}.{kind}": experts[2 * i + j] for i in range(3) for j, kind in _HALVES}
    write_packed(tmp_path / SINGLE_FILE, named, data_start=data_start)
    checkpoint = open_checkpoint(tmp_path)
    whole = torch.empty((3, 2 * rows, 512), device="meta")
    pieces = tuple(
        TensorSlice(
            checkpoint.entries[f"{i}.{kind}"],
            View.whole((rows, 512)),
            View.of(whole[i, j * rows : (j + 1) * rows]),
        )
        for j, kind in _HALVES
        for i in range(3)
    )
    recipe = Recipe("gate_up", (3, 2 * rows, 512), dtype, pieces)
    with opened(checkpoint, [recipe], bounce_bytes=10_000) as rig:
        rig.fill(0xFF)
        made = rig.load()["gate_up"]
        copied = rig.loader.statistics().bytes_copied
    wanted = torch.stack([torch.cat(experts[2 * i : 2 * i + 2]) for i in range(3)])
    assert same_bits(made, wanted.to(dtype))
    nbytes = wanted.numel() * 2
    if dtype is torch.bfloat16 and rows % 4 == 0 and data_start == PAGE:
        assert copied == 0
    elif dtype is torch.float32:
        assert copied == nbytes
    else:
        assert copied <= nbytes, "each byte once: from a bounce buffer, or moved"


_HALVES = tuple(enumerate(["gate", "up"]))


def test_a_conversion_sees_whole_tensors_as_stored(tmp_path: Path) -> None:
    stored = {
        "a": random_floats(torch.bfloat16, (300, 70)),
        "b": random_tensor(torch.int8, (5,)),
        "none": random_tensor(torch.float32, (0, 2)),
    }
    write_packed(tmp_path / SINGLE_FILE, stored)
    checkpoint = open_checkpoint(tmp_path)
    seen = {}

    def convert(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.update(tensors)
        return tensors["a"].t() * len(tensors["b"])

    recipe = computed(
        "it",
        (70, 300),
        torch.float32,
        convert,  # type: ignore[arg-type]
        tuple(checkpoint.entries.values()),
    )
    with opened(checkpoint, [recipe], bounce_bytes=100) as rig:
        made = rig.load()["it"]
        statistics = rig.loader.statistics()
    assert same_bits(made, (stored["a"].t() * 5).to(torch.float32))
    assert set(seen) == set(stored)
    assert all(same_bits(seen[name], stored[name]) for name in stored)
    assert statistics.bytes_copied == statistics.bytes_loaded == 300 * 70 * 2 + 5


def test_a_conversion_to_nothing_makes_nothing(tmp_path: Path) -> None:
    write_packed(tmp_path / SINGLE_FILE, {"a": torch.ones(3)})
    checkpoint = open_checkpoint(tmp_path)
    recipe = computed(
        "it",
        (0, 3),
        torch.float32,
        lambda stored: stored["a"][:0].view(0, 3),
        tuple(checkpoint.entries.values()),
    )
    with opened(checkpoint, [recipe]) as rig:
        assert rig.load()["it"].shape == (0, 3)


def test_a_unit_can_be_loaded_again_and_elsewhere(
    tiny_checkpoint: TinyCheckpoint,
) -> None:
    folder = tiny_checkpoint(SHAPES)
    checkpoint = open_checkpoint(folder)
    recipes = plain_recipes(checkpoint)
    with opened(checkpoint, recipes, recipes) as rig:
        first = rig.load()
        rig.fill(0xFF)
        second = rig.load()
        assert rig.loader.statistics().num_loads == 4
    for name, wanted in loaded_by_safetensors(folder).items():
        assert same_bits(first[name], wanted)
        assert same_bits(second[name], wanted)


@pytest.fixture
def two_units(tiny_checkpoint: TinyCheckpoint) -> tuple[Checkpoint, list[list[Recipe]]]:
    """A unit that is read in place and one that is cast."""
    checkpoint = open_checkpoint(tiny_checkpoint(SHAPES))
    cast = [plain(checkpoint.entries["b"], name="b", dtype=torch.float32)]
    return checkpoint, [[plain_recipes(checkpoint)[0]], cast]


TwoUnits = tuple[Checkpoint, list[list[Recipe]]]


def only_file(checkpoint: Checkpoint) -> Path:
    (path,) = checkpoint.stamps
    return path


def test_a_file_that_shrank_is_an_error_of_the_unit(two_units: TwoUnits) -> None:
    checkpoint, units = two_units
    with opened(checkpoint, *units) as rig:
        os.truncate(only_file(checkpoint), 1000)
        for index, load in enumerate(rig.start()):
            load.wait_quietly()
            for _ in range(2):  # each time it is asked
                with pytest.raises(CheckpointChangedError) as caught:
                    load.wait()
                assert f"unit 'unit {index}'" in str(caught.value)
                assert str(only_file(checkpoint)) in str(caught.value)


def test_an_error_of_the_device_is_an_error_of_the_unit(
    two_units: TwoUnits, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, units = two_units

    def preadv(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with opened(checkpoint, *units) as rig:
        rig.load()
        monkeypatch.setattr(os, "preadv", preadv)
        for index, load in enumerate(rig.start()):
            with pytest.raises(
                ReadError, match=rf"unit 'unit {index}': .*Input/output error"
            ):
                load.wait()
        monkeypatch.undo()
        rig.load()


def test_a_conversion_that_fails_is_an_error_of_the_unit(tmp_path: Path) -> None:
    write_packed(tmp_path / SINGLE_FILE, {"a": torch.ones(3)})
    checkpoint = open_checkpoint(tmp_path)

    def convert(stored: object) -> torch.Tensor:
        raise ArithmeticError("cannot be done")

    recipe = computed(
        "it",
        (3,),
        torch.float32,
        convert,
        tuple(checkpoint.entries.values()),
    )
    with opened(checkpoint, [recipe]) as rig:
        (load,) = rig.start()
        with pytest.raises(
            PenstockError, match=r"'unit 0' cannot .*cannot be done"
        ) as e:
            load.wait()
        assert isinstance(e.value.__cause__, ArithmeticError)


def test_an_error_that_is_kept_does_not_keep_the_arena(two_units: TwoUnits) -> None:
    checkpoint, units = two_units
    before = mapped_bytes()
    kept = []
    with opened(checkpoint, *units) as rig:
        os.truncate(only_file(checkpoint), 1000)
        for load in rig.start():
            with pytest.raises(CheckpointChangedError) as caught:
                load.wait()
            kept.append(caught.value)
    assert len(kept) == 2
    assert mapped_bytes() == before


def test_closing_finishes_the_copies_under_way(two_units: TwoUnits) -> None:
    checkpoint, units = two_units
    with opened(checkpoint, *units, bounce_bytes=PAGE) as rig:
        loads = rig.start()
        rig.loader.close()
        rig.loader.close()
        loads[1].wait()


class TestArena:
    """The memory that units are loaded into."""

    def test_its_memory_is_aligned_and_writable_to_the_last_byte(self) -> None:
        with Arena(3 * PAGE) as arena:
            view = arena.view(0, 3 * PAGE)
            assert address_of(view) % (2 << 20) == 0
            view[:] = b"\xff" * len(view)
            assert arena.view(3 * PAGE - 1, 1)[0] == 0xFF
            assert len(arena.view(PAGE, PAGE)) == PAGE
            del view

    @pytest.mark.parametrize("times", [1, 2])
    def test_closing_gives_the_memory_back(self, times: int) -> None:
        before = mapped_bytes()
        arena = Arena(5 << 20)
        address = address_of(arena.view(0, 5 << 20))
        assert is_mapped(address)
        for _ in range(times):
            arena.close()
        assert not is_mapped(address)
        assert mapped_bytes() == before
        with pytest.raises(ClosedError, match="load the model again"):
            arena.view(0, 1)

    def test_a_tensor_that_outlives_it_keeps_its_bytes_until_it_is_gone(self) -> None:
        arena = Arena(5 << 20)
        view = arena.view(PAGE, 4)
        view[:] = b"abcd"
        tensor = torch.frombuffer(view, dtype=torch.uint8)
        address = tensor.data_ptr()
        del view
        arena.close()
        arena.close()
        assert bytes(tensor.tolist()) == b"abcd"
        assert is_mapped(address)
        del tensor
        assert not is_mapped(address)

    def test_more_than_the_system_has_does_not_fit(self) -> None:
        with pytest.raises(DoesNotFitError, match="lower device_memory"):
            Arena(1 << 62)

    def test_it_takes_no_memory_before_it_is_written(self) -> None:
        with Arena(64 << 20) as arena:
            view = arena.view(0, 64 << 20)
            assert resident_bytes(address_of(view)) == 0
            view[5 << 20] = 1
            assert 0 < resident_bytes(address_of(view)) <= 2 << 20
            del view

    def test_it_stands_on_huge_pages_where_the_system_has_them(self) -> None:
        path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
        if not path.exists() or "[never]" in path.read_text():
            pytest.skip("this system has no huge pages")
        with Arena(8 << 20) as arena:
            view = arena.view(0, 8 << 20)
            view[:] = b"\x01" * len(view)
            flags = smaps(address_of(view))["VmFlags"].split()
            assert "hg" in flags, "advised to use huge pages"
            assert "sh" not in flags, "shared memory rarely gets any"
            del view

    def test_a_child_does_not_share_it(self) -> None:
        """open(2): a fork during a direct read into private memory may tear it."""
        with Arena(1 << 20) as arena:
            assert "dc" in smaps(address_of(arena.view(0, 1)))["VmFlags"].split()

    def test_it_is_made_where_advice_is_refused(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Stubborn(mmap.mmap):
            def madvise(self, *_: int) -> None:
                raise OSError(errno.EINVAL, "no huge pages in this kernel")

        monkeypatch.setattr(mmap, "mmap", Stubborn)
        with Arena(PAGE) as arena:
            assert len(arena.view(0, PAGE)) == PAGE

    def test_its_repr_says_whether_it_is_open(self) -> None:
        arena = Arena(PAGE)
        assert repr(arena) == "<Arena: 4096 bytes, open>"
        arena.close()
        assert repr(arena) == "<Arena: 4096 bytes, closed>"


def address_of(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def is_mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return True
    return False


def smaps(address: int) -> dict[str, str]:
    """What the kernel says of the mapping that holds `address`."""
    found: dict[str, str] = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            if found:
                break
            is_it = int(head[1], 16) <= address < int(head[2], 16)
        elif is_it:
            key, _, value = line.partition(":")
            found[key] = value
    return found


def resident_bytes(address: int) -> int:
    return int(smaps(address)["Rss"].split()[0]) * 1024


def test_nothing_is_left_of_an_interrupted_load(two_units: TwoUnits) -> None:
    checkpoint, units = two_units

    def interrupted() -> None:
        with opened(checkpoint, *units) as rig:
            rig.start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()


@pytest.mark.parametrize("reader", READERS)
def test_in_steady_state_a_unit_costs_no_memory_and_no_copy(
    reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No mapping is made, no page of memory is touched for the first time, nothing is
    kept, and the CPU copies no byte."""
    tensors = {name: random_floats(torch.float32, (512, 512)) for name in "abcd"}
    save_file(tensors, tmp_path / SINGLE_FILE)
    checkpoint = open_checkpoint(tmp_path)
    recipes = [plain(e, name=n, dtype=e.dtype) for n, e in checkpoint.entries.items()]
    num_loads = 40
    with opened(checkpoint, recipes[:2], recipes[2:], reader=reader) as rig:
        for _ in range(10):
            rig.load()
        mapped = mapped_bytes()
        gc.collect()
        kept, faults = [], []
        tracemalloc.start()
        try:
            for _ in range(3):
                before = tracemalloc.get_traced_memory()[0]
                faults_before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                for _ in range(num_loads):
                    for load in rig.start():
                        load.wait()
                    del load
                faults_after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                gc.collect()
                kept.append(tracemalloc.get_traced_memory()[0] - before)
                faults.append(faults_after - faults_before)
        finally:
            tracemalloc.stop()
        assert mapped_bytes() == mapped
        # What each load costs it costs each time; a table that grows once does not.
        assert min(kept) < 200 * num_loads  # a unit of 2 MiB: not even its description
        # The slots have 2 x 2 MiB, 1,024 pages, and are filled 40 times.
        assert min(faults) < 1024
        statistics = rig.loader.statistics()
        assert statistics.bytes_copied == 0
