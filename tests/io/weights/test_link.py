"""A link brings units in order, whatever fails on the way, and ends when it is told."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import mapped_bytes
from penstock.io.checkpoint.header import FileStamp
from penstock.io.devices.device import CpuDevice, CpuStream, Device
from penstock.io.errors import ClosedError, PenstockError, ReadError
from penstock.io.event import Event
from penstock.io.extent import Extent
from penstock.io.fallbacks import Fallbacks
from penstock.io.memory.arena import Arena, Memory
from penstock.io.pace import Pace
from penstock.io.readers.threads import ThreadReader
from penstock.io.weights.layout import Layout, Placed
from penstock.io.weights.link import Link
from penstock.io.weights.loader import Loader
from penstock.io.weights.peer import PeerTier
from penstock.io.weights.source import StagedSource
from penstock.io.weights.steps import LoadSteps, Read
from penstock.io.weights.transfer import same_layout

pytestmark = pytest.mark.usefixtures("no_leaks")

PAGE = 4096


@dataclass
class Units:
    """A file of units that lie side by side, each of so many pages of its own bytes."""

    path: Path
    pages: Sequence[int]

    def __post_init__(self) -> None:
        self.starts = [0, *itertools.accumulate(n * PAGE for n in self.pages)]
        content = [self.content(unit) for unit in range(len(self.pages))]
        self.path.write_bytes(b"".join(content))
        self.layouts = [
            Layout.of(
                f"unit{unit}",
                n * PAGE,
                LoadSteps((Read(Extent(self.path, self.starts[unit], n * PAGE), 0),)),
                (Placed(f"{unit}.weight", 0, torch.uint8, (n * PAGE,)),),
                n * PAGE,
            )
            for unit, n in enumerate(self.pages)
        ]

    def content(self, unit: int) -> bytes:
        return bytes([unit + 1]) * (self.pages[unit] * PAGE)


@dataclass
class Faulty:
    """`os.preadv`, which waits until it may go on, tells when it read (`then`), and
    fails once at each of these offsets."""

    fail_at: set[int] = field(default_factory=set)
    go: threading.Event = field(default_factory=threading.Event)
    then: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self._real = os.preadv

    def __call__(self, descriptor: int, buffers: Any, offset: int) -> int:
        self.go.wait()
        self.then()
        if offset in self.fail_at:
            self.fail_at.remove(offset)
            raise OSError(5, "Input/output error")
        return self._real(descriptor, buffers, offset)


@pytest.fixture
def preadv(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    faulty = Faulty()
    monkeypatch.setattr(os, "preadv", faulty)
    yield faulty
    faulty.go.set()  # whatever failed: no thread hangs


@contextmanager
def opened(
    units: Units,
    *,
    staging_pages: int,
    target_pages: int,
    device: Device | None = None,
    change_loader: Callable[[Loader], None] = lambda loader: None,
    **options: Any,
) -> Iterator[tuple[Link, Memory]]:
    """A link from the file through a ring into an arena, and that arena."""
    options.setdefault("pace", None)
    stamps = {units.path: FileStamp.of(units.path.stat())}
    with (
        ThreadReader(
            stamps,
            num_threads=2,
            chunk_bytes=1 << 20,
            direct=False,
            fallbacks=Fallbacks(),
        ) as read,
        Arena(target_pages * PAGE) as target,
    ):
        memory = Arena(staging_pages * PAGE)
        loader = Loader(units.layouts, memory, read, bounce_bytes=PAGE)
        change_loader(loader)
        ways = dict(enumerate(map(same_layout, units.layouts)))
        source = StagedSource(loader, units.layouts, memory)
        made = Link("disk", source, ways, target, device or CpuDevice(), **options)
        with made as link:
            yield link, target


def holds(target: Memory, offset: int, units: Units, unit: int) -> bool:
    content = units.content(unit)
    return target.tensor(offset, len(content)).numpy().tobytes() == content


# What comes.


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=5),
    st.integers(0, 8),
    st.data(),
)
def test_whatever_the_ring_holds_units_come_whole_and_in_order(
    tmp_path_factory: pytest.TempPathFactory,
    pages: list[int],
    spare: int,
    data: st.DataObject,
) -> None:
    units = Units(tmp_path_factory.mktemp("units") / "weights", pages)
    order = data.draw(
        st.lists(st.integers(0, len(pages) - 1), min_size=1, max_size=12), "order"
    )
    total = sum(pages[unit] for unit in order)
    with opened(units, staging_pages=max(pages) + spare, target_pages=total) as (
        link,
        target,
    ):
        loads, offset = [], 0
        for unit in order:
            loads.append((unit, offset, link.load(unit, offset, ())))
            offset += pages[unit] * PAGE
        for index, (unit, start, load) in enumerate(loads):
            load.wait()
            assert holds(target, start, units, unit)
            assert all(before.is_done for _, _, before in loads[:index])
        statistics = link.statistics()
    assert statistics.bytes_moved == total * PAGE
    assert statistics.num_copies == len(order)


def test_two_threads_may_ask_at_once(tmp_path: Path) -> None:
    units = Units(tmp_path / "weights", [1, 2, 1, 3])
    start_line = threading.Barrier(2)
    wrong: list[int] = []
    with opened(units, staging_pages=4, target_pages=6) as (link, target):

        def ask(first: int, offset: int) -> None:
            start_line.wait()
            for turn in range(60):
                unit = (first + turn) % 4
                link.load(unit, offset, ()).wait()
                if not holds(target, offset, units, unit):
                    wrong.append(unit)

        threads = [threading.Thread(target=ask, args=(i, 3 * i * PAGE)) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert link.statistics().num_copies == 120


# What fails.


def test_a_failed_read_is_raised_by_the_unit_that_needed_it_and_by_no_other(
    tmp_path: Path, preadv: Faulty
) -> None:
    units = Units(tmp_path / "weights", [1, 1, 1, 1])
    preadv.fail_at = {PAGE}
    preadv.go.set()
    with opened(units, staging_pages=1, target_pages=5) as (link, target):
        loads = [link.load(unit, unit * PAGE, ()) for unit in range(4)]
        for unit in (3, 2, 0):
            loads[unit].wait()
            assert holds(target, unit * PAGE, units, unit)
        for _ in range(2):  # whoever waits again is told again
            with pytest.raises(ReadError) as error:
                loads[1].wait()
            assert str(error.value) == (
                f"unit 'unit1': reading {PAGE} bytes at {PAGE} of {units.path} failed: "
                "Input/output error"
            )
        again = link.load(1, 4 * PAGE, ())
        again.wait()
        assert holds(target, 4 * PAGE, units, 1)
        assert link.statistics().bytes_moved == 4 * PAGE


def test_who_keeps_an_error_keeps_no_memory(tmp_path: Path, preadv: Faulty) -> None:
    units = Units(tmp_path / "weights", [1])
    preadv.fail_at = {0}
    preadv.go.set()
    before = mapped_bytes()

    def failing() -> PenstockError:
        with opened(units, staging_pages=1, target_pages=1) as (link, _):
            try:
                link.load(0, 0, ()).wait()
            except PenstockError as error:
                return error.with_traceback(None)
        raise AssertionError("the read did not fail")

    kept = failing()
    assert mapped_bytes() == before
    assert "unit0" in str(kept)


def test_a_load_that_cannot_even_begin_fails_alone(tmp_path: Path) -> None:
    """It must neither lose its piece of the ring nor end the link's thread."""
    units = Units(tmp_path / "weights", [1, 1, 1])

    def refuse(loader: Loader) -> None:
        load = loader.load

        def load_but_one(unit: int, offset: int) -> Any:
            if unit == 1:
                raise ReadError(f"no reading of {unit}")
            return load(unit, offset)

        loader.load = load_but_one  # type: ignore[method-assign,assignment]

    with opened(units, staging_pages=1, target_pages=3, change_loader=refuse) as (
        link,
        target,
    ):
        for _ in range(3):
            loads = [link.load(unit, unit * PAGE, ()) for unit in range(3)]
            with pytest.raises(ReadError, match="no reading of 1"):
                loads[1].wait()
            for unit in (0, 2):
                loads[unit].wait()
                assert holds(target, unit * PAGE, units, unit)


class BadStream(CpuStream):
    """Fails its copies by number; `is_gone`, it does nothing at all any more."""

    def __init__(self, fail: set[int], *, is_gone: bool) -> None:
        self._fail = fail
        self._is_gone = is_gone
        self._num_copies = 0
        self._has_failed = False

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._num_copies += 1
        self._has_failed = self._num_copies - 1 in self._fail
        if self._has_failed:
            raise RuntimeError("an illegal memory access was encountered")
        super().copy(target, source)

    def record(self) -> Event:
        if self._is_gone and self._has_failed:
            raise RuntimeError("the device is gone")
        return super().record()


class BadDevice(CpuDevice):
    def __init__(self, fail: set[int], *, is_gone: bool) -> None:
        self._stream = BadStream(fail, is_gone=is_gone)

    def stream(self) -> CpuStream:
        return self._stream


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_failed_copy_names_its_unit_and_the_next_ones_work(
    is_gone: bool, tmp_path: Path
) -> None:
    units = Units(tmp_path / "weights", [1, 1, 1])
    device = BadDevice({1}, is_gone=is_gone)
    with opened(units, staging_pages=1, target_pages=3, device=device) as (
        link,
        target,
    ):
        loads = [link.load(unit, unit * PAGE, ()) for unit in range(3)]
        what = "is gone" if is_gone else "illegal memory access"
        with pytest.raises(PenstockError, match=rf"'unit1' could not be .*{what}"):
            loads[1].wait()
        loads[1].wait_quietly()
        for unit in (0, 2):
            loads[unit].wait()
            assert holds(target, unit * PAGE, units, unit)
        assert link.statistics().num_copies == 2


def test_a_peer_that_cannot_be_filled_names_the_unit_and_keeps_nothing(
    tmp_path: Path, preadv: Faulty
) -> None:
    units = Units(tmp_path / "weights", [1, 2, 1])
    ways = dict(enumerate(map(same_layout, units.layouts)))
    stamps = {units.path: FileStamp.of(units.path.stat())}
    preadv.go.set()
    told: list[tuple[int, int]] = []

    def open_link(memory: Memory, device: Device) -> Link:
        staging = Arena(2 * PAGE)
        loader = Loader(units.layouts, staging, read, bounce_bytes=PAGE)
        source = StagedSource(loader, units.layouts, staging)
        return Link("disk", source, ways, memory, device, pace=None)

    def fill() -> PeerTier:
        return PeerTier(
            ways,
            [2, 1],
            CpuDevice(),
            open_link=open_link,
            progress=lambda done, total: told.append((done, total)),
        )

    with ThreadReader(
        stamps, num_threads=2, chunk_bytes=PAGE, direct=False, fallbacks=Fallbacks()
    ) as read:
        preadv.fail_at = {PAGE}
        before = mapped_bytes()
        with pytest.raises(ReadError, match=r"unit 'unit1': .* at 4096 of "):
            fill()
        assert mapped_bytes() == before
        assert told == [(PAGE, 3 * PAGE)]
        with fill() as peer:
            assert peer.offsets == {2: 0, 1: PAGE}
            assert all(
                holds(peer.memory, at, units, u) for u, at in peer.offsets.items()
            )
    assert told[1:] == [(PAGE, 3 * PAGE), (3 * PAGE, 3 * PAGE)]


# The end.


def test_closing_finishes_what_is_under_way(tmp_path: Path, preadv: Faulty) -> None:
    units = Units(tmp_path / "weights", [1, 2, 1, 1])
    with opened(units, staging_pages=2, target_pages=5) as (link, target):
        loads = [link.load(unit, units.starts[unit], ()) for unit in range(4)]
        closing = threading.Thread(target=link.close)
        closing.start()
        assert not any(load.is_done for load in loads)
        preadv.go.set()
        closing.join()
        for unit, load in enumerate(loads):
            assert load.is_done
            assert holds(target, units.starts[unit], units, unit)
        link.close()
        assert repr(link) == "<Link: disk to cpu, closed>"


def test_nothing_is_loaded_after_the_end_and_nobody_waits_for_ever(
    tmp_path: Path,
) -> None:
    units = Units(tmp_path / "weights", [1])
    with opened(units, staging_pages=1, target_pages=1) as (link, _):
        assert repr(link) == "<Link: disk to cpu, open>"
        link.close()
        with pytest.raises(ClosedError, match="disk is closed"):
            link.load(0, 0, ())


# Held to a speed, by a clock of ours.


@dataclass
class Time:
    """Passes only by sleeping, or where a test says so."""

    now: float = 0.0
    slept: list[float] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


def test_a_held_link_is_late_by_its_bandwidth_and_its_latency_once(
    tmp_path: Path, preadv: Faulty
) -> None:
    units = Units(tmp_path / "weights", [1, 2, 1])
    time = Time()
    pace = Pace(bytes_per_second=PAGE, latency_seconds=0.5)
    with opened(
        units,
        staging_pages=4,
        target_pages=4,
        pace=pace,
        sleep=time.sleep,
        clock=time.clock,
    ) as (link, target):
        loads = [link.load(unit, units.starts[unit], ()) for unit in range(3)]
        preadv.go.set()  # all were given at 0: they go back to back
        for unit, load in enumerate(loads):
            load.wait()
            assert holds(target, units.starts[unit], units, unit)
        assert time.slept == [1.5, 2.0, 1.0]
        time.pass_by(100.0)
        link.load(1, 0, ()).wait()
        assert time.slept[3:] == [2.5]  # an idle link saves nothing up


def test_a_drive_is_held_by_what_it_reads_not_by_what_is_made_of_it(
    tmp_path: Path, preadv: Faulty
) -> None:
    """For instance, half as many bytes are stored, and are cast while they are
    loaded."""
    units = Units(tmp_path / "weights", [2])
    units.layouts = [replace(one, stored_bytes=PAGE) for one in units.layouts]
    time, held = Time(), Pace(bytes_per_second=PAGE, latency_seconds=0.0)
    clocks: Any = {"sleep": time.sleep, "clock": time.clock}
    preadv.go.set()
    with opened(units, staging_pages=2, target_pages=2, pace=held, **clocks) as (
        link,
        _,
    ):
        link.load(0, 0, ()).wait()
        assert link.statistics().bytes_moved == 2 * PAGE
    assert time.slept == [1.0]


def test_a_unit_is_not_there_before_the_held_link_says_so(tmp_path: Path) -> None:
    units = Units(tmp_path / "weights", [1])
    was_done: list[bool] = []
    asleep = threading.Event()

    def sleep(seconds: float) -> None:
        asleep.wait()  # until the load is known here
        was_done.append(load.is_done)

    pace = Pace(bytes_per_second=PAGE, latency_seconds=0.0)
    with opened(units, staging_pages=1, target_pages=1, pace=pace, sleep=sleep) as (
        link,
        _,
    ):
        load = link.load(0, 0, ())
        asleep.set()
        load.wait()
    assert was_done == [False]


def test_a_source_that_is_slower_than_the_held_link_is_not_made_slower_still(
    tmp_path: Path, preadv: Faulty
) -> None:
    units = Units(tmp_path / "weights", [1, 1])
    time = Time()
    preadv.then = lambda: time.pass_by(10.0)
    preadv.go.set()
    pace = Pace(bytes_per_second=PAGE, latency_seconds=0.5)
    with opened(
        units,
        staging_pages=1,
        target_pages=1,
        pace=pace,
        sleep=time.sleep,
        clock=time.clock,
    ) as (link, _):
        for unit in range(2):
            link.load(unit, 0, ()).wait()
    assert time.slept == [0.0, 0.0]
