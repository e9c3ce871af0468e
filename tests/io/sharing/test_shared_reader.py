"""Readers that share a ring, in threads and in processes that are killed."""

from __future__ import annotations

import mmap
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import forked_python
from penstock.io.checkpoint.header import FileStamp
from penstock.io.closing import Closing
from penstock.io.errors import ClosedError, MachineError, ReadError
from penstock.io.extent import Extent
from penstock.io.fallbacks import Fallbacks
from penstock.io.handle import Handle
from penstock.io.readers.reader import ReaderStatistics
from penstock.io.readers.threads import ThreadReader
from penstock.io.sharing import ring as ring_module
from penstock.io.sharing.ring import (
    Place,
    RingBrokenError,
    RingShape,
    Seat,
    SharedRing,
)
from penstock.io.sharing.shared_reader import SharedReader
from penstock.io.sharing.table import Do, Key, Table

PAGE = mmap.PAGESIZE
SHAPE = RingShape(num_seats=2, num_slots=16, slot_bytes=2 * PAGE)
UNIT = 5 * PAGE
NUM_UNITS = 12


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(random.Random(1).randbytes(NUM_UNITS * UNIT))
    return path


@pytest.fixture
def ring(no_leaks: None) -> Iterator[SharedRing]:
    with SharedRing(SHAPE) as ring:
        yield ring


def stamps(path: Path) -> dict[Path, FileStamp]:
    return {path: FileStamp.of(path.stat())}


class FailingReader(Closing):
    """Fails, and counts how often."""

    name, alignment = "failing", PAGE

    def __init__(self) -> None:
        self.num_reads = 0

    def submit(
        self, extent: Extent, buffer: memoryview, *, urgent: bool = False
    ) -> Handle:
        self.num_reads += 1
        handle = Handle(1)
        handle.done(ReadError("the drive is gone"))
        return handle

    def statistics(self) -> ReaderStatistics:
        return ReaderStatistics(self.name, 0, self.num_reads, True)

    def close(self) -> None:
        pass


class Process:
    """Reads `path` through the ring, as a worker would."""

    def __init__(self, seat: Seat, path: Path, opened: ExitStack) -> None:
        self.fallbacks = Fallbacks()
        self.path = path
        self.inner = ThreadReader(
            stamps(path),
            num_threads=2,
            chunk_bytes=PAGE,
            direct=False,
            fallbacks=self.fallbacks,
        )
        opened.enter_context(self.inner)
        self.place = opened.enter_context(Place(seat))
        self.reader = SharedReader(self.inner, self.place, stamps(path), self.fallbacks)
        opened.enter_context(self.reader)

    def run(self, num_passes: int, between: Callable[[], None] = lambda: None) -> None:
        """Reads all units `num_passes` times, two at a time, and compares them."""
        content = self.path.read_bytes()
        with mmap.mmap(-1, 2 * UNIT) as memory, memoryview(memory) as view:
            handles: list[Handle] = []
            for number in range(num_passes * NUM_UNITS + 1):
                if number < num_passes * NUM_UNITS:
                    start = number % NUM_UNITS * UNIT
                    here = number % 2 * UNIT
                    with view[here : here + UNIT] as buffer:
                        extent = Extent(self.path, start, UNIT)
                        handles.append(self.reader.submit(extent, buffer))
                if number:
                    handles[number - 1].wait()
                    start = (number - 1) % NUM_UNITS * UNIT
                    here = (number - 1) % 2 * UNIT
                    assert view[here : here + UNIT] == content[start : start + UNIT]
                    between()


def in_threads(*runs: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def guarded(run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "nobody waits for ever"
    if errors:
        raise errors[0]


def test_two_readers_get_the_right_bytes_and_the_drive_gives_them_once(
    ring: SharedRing, weights: Path
) -> None:
    with ExitStack() as opened:
        one, two = (Process(ring.seat(seat), weights, opened) for seat in range(2))
        in_threads(lambda: one.run(20), lambda: two.run(20))
        read = [each.reader.statistics().bytes_read for each in (one, two)]
        shared = [each.reader.bytes_shared for each in (one, two)]
        assert sum(read) + sum(shared) == 2 * 20 * NUM_UNITS * UNIT
        assert sum(read) <= 1.5 * 20 * NUM_UNITS * UNIT, "much was read once"
        assert not list(one.fallbacks)


def test_readers_of_uneven_length_and_speed_get_the_right_bytes(
    ring: SharedRing, weights: Path
) -> None:
    with ExitStack() as opened:
        one, two = (Process(ring.seat(seat), weights, opened) for seat in range(2))
        drawn = random.Random(2)

        def pauses() -> None:
            threading.Event().wait(drawn.choice([0, 0, 0.002]))

        in_threads(lambda: one.run(9), lambda: two.run(4, pauses))


def test_one_reader_alone_puts_nothing_into_the_ring(
    ring: SharedRing, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.io.sharing.in_step.START_SECONDS", 0.0)
    with ExitStack() as opened:
        one = Process(ring.seat(0), weights, opened)
        one.run(2)
        assert one.reader.bytes_shared == 0
        with one.place.locked() as table:
            assert table.find(Key((0, 0), 0, 0)) == -1
            assert "0/16 slots" in repr(table)


def test_short_and_urgent_reads_are_not_shared(ring: SharedRing, weights: Path) -> None:
    with ExitStack() as opened:
        one = Process(ring.seat(0), weights, opened)
        with mmap.mmap(-1, 4 * PAGE) as memory, memoryview(memory) as view:
            one.reader.submit(Extent(weights, 0, PAGE), view).wait()
            one.reader.submit(Extent(weights, 0, 4 * PAGE), view, urgent=True).wait()
            assert view == weights.read_bytes()[: 4 * PAGE]


def test_an_error_reaches_who_waits_and_the_next_one_reads_itself(
    ring: SharedRing, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.io.sharing.in_step.START_SECONDS", 0.1)
    fallbacks = Fallbacks()
    with ExitStack() as opened:
        two = Process(ring.seat(1), weights, opened)
        place = opened.enter_context(Place(ring.seat(0)))
        failing = FailingReader()
        one = SharedReader(failing, place, stamps(weights), fallbacks)
        opened.enter_context(one)

        def fails() -> None:
            with mmap.mmap(-1, UNIT) as memory, memoryview(memory) as view:
                for _ in range(3):
                    with pytest.raises(ReadError, match="the drive is gone"):
                        one.submit(Extent(weights, 0, UNIT), view).wait()

        in_threads(fails)
        in_threads(lambda: two.run(3))
        assert failing.num_reads == 3 * 3, "pieces of two pages"
    with pytest.raises(ClosedError), memoryview(bytearray(UNIT)) as view:
        one.submit(Extent(weights, 0, UNIT), view)


def test_a_table_that_was_left_half_written_ends_the_sharing_only(
    ring: SharedRing, weights: Path
) -> None:
    with ExitStack() as opened:
        one, two = (Process(ring.seat(seat), weights, opened) for seat in range(2))
        head = two.place._head

        def breaks() -> None:
            head["is_changing"] = 1

        in_threads(lambda: one.run(4, breaks), lambda: two.run(4))
        (sentence,) = one.fallbacks
        assert "died while it changed" in sentence
        assert "reads all itself from now on" in sentence


def test_nobody_waits_long_for_the_lock_of_one_that_has_stopped(
    ring: SharedRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring_module, "_LOCK_SECONDS", 0.0)
    with Place(ring.seat(0)) as one, Place(ring.seat(1)) as two:
        one._lock(0)
        with pytest.raises(RingBrokenError, match="holds its lock"), two.locked():
            pass
        one._unlock(0)


def test_a_ring_is_divided_among_its_users_or_there_is_none() -> None:
    shape = RingShape.within(1 << 30, num_seats=2, most_piece_bytes=8 << 20)
    assert shape == RingShape(2, 128, 8 << 20)
    small = RingShape.within(100 * PAGE, num_seats=2, most_piece_bytes=8 << 20)
    assert small == RingShape(2, 16, 6 * PAGE)
    many = RingShape.within(1 << 20, num_seats=8, most_piece_bytes=8 << 20)
    assert many is not None
    assert many.num_slots == 64
    for nbytes, seats in ((15 * PAGE, 2), (0, 2), (1 << 30, 63)):
        assert not RingShape.within(nbytes, num_seats=seats, most_piece_bytes=1 << 20)


def test_a_system_without_such_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(MachineError, match="cannot be shared"):
        SharedRing(SHAPE)


def test_a_seat_is_for_processes_that_multiprocessing_starts(ring: SharedRing) -> None:
    assert repr(ring.seat(1)) == "<Seat 1 of 2>"
    with Place(ring.seat(1)) as place:
        assert "Place 1" in repr(place)


# In processes, one of which is killed.


def look(table: Table, seat: int, key: Key) -> Do:
    return table.look(seat, key, gone=0, is_patient=True, may_read=True).do


def killed_while_it_reads(seat: Seat) -> None:
    """With a piece claimed, and another one pinned."""
    place = Place(seat)
    with place.locked() as table:
        table.arrive(seat.number)
        table.depart(seat.number, is_first=False, gone=0, is_patient=False)
        for number in range(2):
            key = Key((1, 2), number, 1)
            look(table, seat.number, key)
    os.kill(os.getpid(), signal.SIGKILL)


def killed_with_the_lock(seat: Seat) -> None:
    with Place(seat).locked():
        os.kill(os.getpid(), signal.SIGKILL)


def run_until_killed(target: Callable[[Seat], None], seat: Seat) -> None:
    process = forked_python.context.Process(target=target, args=(seat,))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    process.close()


@pytest.mark.usefixtures("own_processes")
def test_what_a_killed_process_had_begun_others_do() -> None:
    with SharedRing(SHAPE) as ring, Place(ring.seat(0)) as place:
        with place.locked() as table:
            table.arrive(0)
        run_until_killed(killed_while_it_reads, ring.seat(1))
        with place.locked() as table:
            assert table.attached == 3
            assert table.members == 3, "they began together"
            assert look(table, 0, Key((1, 2), 0, 1)) is Do.WAIT
        assert place.gone() == 0
        with place.locked() as table:
            assert table.attached == 1
            assert look(table, 0, Key((1, 2), 0, 1)) is Do.READ_ALONE


@pytest.mark.usefixtures("own_processes")
def test_one_that_is_killed_with_the_lock_stops_nobody() -> None:
    with SharedRing(SHAPE) as ring, Place(ring.seat(0)) as place:
        run_until_killed(killed_with_the_lock, ring.seat(1))
        with pytest.raises(RingBrokenError, match="died"), place.locked():
            pass


def test_one_that_does_not_run_is_not_waited_for(ring: SharedRing) -> None:
    now = [0.0]
    with (
        Place(ring.seat(0), clock=lambda: now[0]) as one,
        Place(ring.seat(1), clock=lambda: now[0]) as two,
    ):
        assert one.gone() == 0
        now[0] = 6.0
        assert one.gone() == 2
        two.beat()
        assert one.gone() == 0
