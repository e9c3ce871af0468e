"""No unit is ever overwritten while it is read, and none is read before it is there.

The loads are fakes that write a unit's stamp into a bytearray whenever the test says.
One checker watches every run: this working set's, and that of a planted rule that is
known to be wrong, which it must catch.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, Protocol

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.io.errors import ClosedError, DoesNotFitError, ReadError
from penstock.io.event import Event
from penstock.io.handle import Handle
from penstock.io.weights.loader import UnitLoad
from penstock.scheduler.slots.open_sites import OpenSites, Site
from penstock.scheduler.slots.working_set import WorkingSet

When = Literal["at once", "when waited for", "in any order"]
WHENS: tuple[When, ...] = ("at once", "when waited for", "in any order")


def stamp(unit: int) -> int:
    return unit + 1  # 0 is what an arena holds before anything was loaded


@dataclass(eq=False)
class FakeLoad:
    """Writes its unit's stamp once somebody lets it."""

    disk: FakeDisk
    unit: int
    offset: int
    error: Exception | None
    is_done: bool = False
    ready: Event | None = None

    def finish(self) -> None:
        if not self.is_done:
            self.is_done = True
            self.disk.pending.remove(self)
            if self.error is None:
                self.disk.write(self.unit, self.offset)

    def wait(self) -> None:
        self.finish()
        if self.error is not None:
            raise self.error

    def wait_quietly(self) -> None:
        self.finish()


@dataclass
class FakeDisk:
    """Records every load; `fail` are units whose next load fails, `refuse` those whose
    next load cannot even begin."""

    sizes: list[int]
    capacity: int
    when: When = "at once"
    rng: random.Random = field(default_factory=random.Random)
    fail: set[int] = field(default_factory=set)
    refuse: set[int] = field(default_factory=set)
    loads: list[int] = field(default_factory=list)
    pending: list[FakeLoad] = field(default_factory=list)
    watch: Callable[[int, int], None] = lambda unit, offset: None

    def __post_init__(self) -> None:
        self.memory = bytearray(self.capacity)

    def load(self, unit: int, offset: int, after: tuple[Event, ...] = ()) -> FakeLoad:
        if unit in self.refuse:
            self.refuse.remove(unit)
            raise ReadError(f"no reading of {unit}")
        self.watch(unit, offset)
        self.loads.append(unit)
        error = ReadError(f"{unit} is unreadable") if unit in self.fail else None
        self.fail.discard(unit)
        load = FakeLoad(self, unit, offset, error)
        self.pending.append(load)
        if self.when == "at once":
            load.finish()
        return load

    def write(self, unit: int, offset: int) -> None:
        end = offset + self.sizes[unit]
        assert 0 <= offset <= end <= self.capacity, f"unit {unit} lands outside"
        self.memory[offset:end] = bytes([stamp(unit)]) * self.sizes[unit]

    def tick(self) -> None:
        """Time passes: some loads end, in any order."""
        if self.when == "in any order" and self.pending:
            for load in self.rng.sample(
                self.pending, self.rng.randint(0, len(self.pending))
            ):
                load.finish()

    def has(self, unit: int, offset: int) -> bool:
        found = self.memory[offset : offset + self.sizes[unit]]
        return found == bytes([stamp(unit)]) * self.sizes[unit]


class Units(Protocol):
    """A store of units that tells where a unit is while it is read."""

    def acquire(self, unit: int) -> int: ...
    def release(self, unit: int) -> None: ...
    def prefetch(self, units: Iterable[int]) -> None: ...


class Checker:
    """Reads units, and writes down whatever goes wrong."""

    def __init__(self, units: Units, disk: FakeDisk) -> None:
        self.problems: list[str] = []
        self.in_use: dict[int, tuple[int, int]] = {}
        """unit: (offset, readers)"""
        self.seen_at: dict[int, int] = {}
        """unit: where it stood when it was read last"""
        self._unread: dict[int, int] = {}
        self._expected: tuple[list[int], list[int]] = ([], [])
        self._is_prefetching = False
        self._units = units
        self._disk = disk
        disk.watch = self._on_load

    def enter(self, unit: int) -> None:
        offset = self._units.acquire(unit)
        self.seen_at[unit] = offset
        self._unread.pop(unit, None)
        known, readers = self.in_use.get(unit, (offset, 0))
        if known != offset:
            self.problems.append(f"{unit} moved from {known} to {offset} in use")
        self.in_use[unit] = (offset, readers + 1)
        self.check()

    def leave(self, unit: int) -> None:
        self._disk.tick()
        self.check()
        offset, readers = self.in_use.pop(unit)
        if readers > 1:
            self.in_use[unit] = (offset, readers - 1)
        self._units.release(unit)

    def expect(self, units: list[int]) -> None:
        self._expected = (self._expected[1], units)
        self._is_prefetching = True
        self._units.prefetch(units)
        self._is_prefetching = False
        self._disk.tick()
        self.check()

    def check(self) -> None:
        for unit, (offset, _) in self.in_use.items():
            if not self._disk.has(unit, offset):
                self.problems.append(f"{unit} has another's weights while it is read")

    def _on_load(self, unit: int, offset: int) -> None:
        end = offset + self._disk.sizes[unit]

        def overlaps(other: int, start: int) -> bool:
            return start < end and offset < start + self._disk.sizes[other]

        for other, (start, _) in self.in_use.items():
            if overlaps(other, start):
                self.problems.append(f"{unit} is loaded over {other}, which is in use")
        for other, start in list(self._unread.items()):
            if overlaps(other, start):
                del self._unread[other]
                if self._is_prefetching and any(other in e for e in self._expected):
                    self.problems.append(
                        f"{unit} is fetched over {other}, still unread"
                    )
        self._unread[unit] = offset


def run_cyclically(
    units: Units,
    disk: FakeDisk,
    *,
    passes: int,
    lookahead: int,
    rng: random.Random | None = None,
) -> tuple[list[str], list[int]]:
    """Runs through all units in turn, pass after pass, as a sweep does; with `rng`,
    some are read twice at once. Returns what went wrong, and each pass's loads."""
    checker, num = Checker(units, disk), len(disk.sizes)
    loads = []
    for _ in range(passes):
        before = len(disk.loads)
        for unit in range(num):
            checker.enter(unit)
            following = ((unit + 1 + step) % num for step in range(lookahead))
            checker.expect([u for u in dict.fromkeys(following) if u != unit])
            if rng is not None and rng.random() < 0.3:
                checker.enter(unit)
                checker.leave(unit)
            checker.leave(unit)
        loads.append(len(disk.loads) - before)
    return checker.problems, loads


def make(
    sizes: list[int],
    capacity: int,
    *,
    when: When = "at once",
    seed: int = 0,
    needed: Iterable[int] | None = None,
    staying: Iterable[int] = (),
) -> tuple[WorkingSet, FakeDisk]:
    disk = FakeDisk(sizes, capacity, when, random.Random(seed))
    working_set = WorkingSet(
        sizes,
        names=[f"unit{unit}" for unit in range(len(sizes))],
        capacity=capacity,
        load=disk.load,
        mark=lambda: None,
        needed=frozenset(range(len(sizes)) if needed is None else needed),
        staying=staying,
    )
    return working_set, disk


SHAPES = [(num, slots) for num in range(1, 41) for slots in range(1, 9)]


# The rule, over every small shape.


@pytest.mark.slow
@pytest.mark.parametrize("lookahead", range(4))
def test_no_slot_is_refilled_before_its_unit_was_released(lookahead: int) -> None:
    for index, (num, slots) in enumerate(SHAPES):
        when = WHENS[(index + lookahead) % 3]
        working_set, disk = make([2] * num, 2 * slots, when=when, seed=index)
        problems, loads = run_cyclically(
            working_set, disk, passes=3, lookahead=lookahead, rng=disk.rng
        )
        assert problems == [], (num, slots, when)
        if slots >= num:
            assert loads == [num, 0, 0], (num, slots)


class ModuloUnits:
    """The planted bug: unit i in slot `i % slots`, and when unit i has been read, the
    load of unit i + slots begins, into that one's slot."""

    def __init__(self, disk: FakeDisk, num: int, slots: int) -> None:
        self._disk, self._num, self._slots = disk, num, slots
        self._loads = [disk.load(u, self._offset(u)) for u in range(min(num, slots))]

    def _offset(self, unit: int) -> int:
        return unit % self._slots * self._disk.sizes[unit]

    def acquire(self, unit: int) -> int:
        for load in self._loads:
            if load.unit == unit:
                load.wait()
        return self._offset(unit)

    def release(self, unit: int) -> None:
        following = (unit + self._slots) % self._num
        self._loads.append(self._disk.load(following, self._offset(following)))
        del self._loads[: -self._slots]

    def prefetch(self, units: Iterable[int]) -> None:
        pass


@pytest.mark.slow
def test_the_checker_finds_the_wrong_weights_of_slots_by_modulo() -> None:
    wrong = set()
    for num, slots in SHAPES:
        disk = FakeDisk([1] * num, max(num, slots))
        units = ModuloUnits(disk, num, slots)
        problems, _ = run_cyclically(units, disk, passes=3, lookahead=0)
        if any("another's weights" in problem for problem in problems):
            wrong.add((num, slots))
    assert wrong == {(n, k) for n, k in SHAPES if 1 < k < n and n % k}
    assert len(wrong) == 185


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=10),
    st.integers(0, 30),
    st.integers(0, 3),
    st.sampled_from(WHENS),
    st.integers(0, 999),
)
def test_units_of_any_sizes_are_right_while_they_are_read(
    sizes: list[int], spare: int, lookahead: int, when: When, seed: int
) -> None:
    working_set, disk = make(sizes, max(sizes) + spare, when=when, seed=seed)
    problems, loads = run_cyclically(
        working_set, disk, passes=4, lookahead=lookahead, rng=disk.rng
    )
    assert problems == []
    if sum(sizes) <= disk.capacity:
        assert loads == [len(sizes), 0, 0, 0]


@pytest.mark.slow
@settings(max_examples=150)
@given(st.data())
def test_whatever_is_read_fetched_or_kept_in_any_order_the_weights_are_right(
    data: st.DataObject,
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    capacity = max(sizes) + data.draw(st.integers(0, 20))
    when = data.draw(st.sampled_from(WHENS))
    working_set, disk = make(sizes, capacity, when=when)
    checker = Checker(working_set, disk)
    units = st.integers(0, len(sizes) - 1)
    kept: set[int] = set()
    for act in data.draw(st.lists(st.sampled_from("eeellpk"), max_size=40)):
        if act == "e":
            unit = data.draw(units)
            try:
                checker.enter(unit)
            except DoesNotFitError as error:
                assert_does_not_fit(unit, checker, kept, disk, str(error))
        elif act == "l" and checker.in_use:
            checker.leave(data.draw(st.sampled_from(sorted(checker.in_use))))
        elif act == "p":
            checker.expect(data.draw(st.lists(units, max_size=3, unique=True)))
        elif act == "k" and checker.in_use:
            unit = data.draw(st.sampled_from(sorted(checker.in_use)))
            if working_set.keep(unit):
                kept.add(unit)
        assert checker.problems == []
    while checker.in_use:
        checker.leave(min(checker.in_use))
    for unit in range(len(sizes)):  # whatever became resident: all still find room
        checker.enter(unit)
        checker.leave(unit)
    assert checker.problems == []
    assert set(working_set.statistics().resident_units) == kept


def test_an_acquire_that_cannot_fit_throws_nothing_out() -> None:
    working_set, disk = make([6, 6, 13, 5], 24)
    checker = Checker(working_set, disk)
    checker.enter(0)
    checker.expect([3])
    checker.enter(1)
    with pytest.raises(DoesNotFitError):
        checker.enter(2)
    loads = len(disk.loads)
    checker.enter(3)
    assert len(disk.loads) == loads, "what was fetched ahead is still there"
    assert working_set.statistics().num_unused_loads == 0


def assert_does_not_fit(
    unit: int, checker: Checker, kept: set[int], disk: FakeDisk, message: str
) -> None:
    """It was right to refuse `unit`, and what it says would work."""
    taken = bytearray(disk.capacity)
    stay = {*checker.in_use, *kept}
    for other in stay:
        start = checker.seen_at[other]
        taken[start : start + disk.sizes[other]] = b"\1" * disk.sizes[other]
    largest = max(len(piece) for piece in bytes(taken).split(b"\1"))
    assert largest < disk.sizes[unit]
    least = disk.sizes[unit] + sum(disk.sizes[other] for other in stay)
    enough = max(least, disk.capacity + disk.sizes[unit] - largest)
    said = int(message.rpartition(" ")[2])
    assert said == (least if least > disk.capacity else enough)


# How much is read.


def test_a_model_that_fits_is_read_once() -> None:
    sizes = [7, 3, 5, 5, 11, 1]
    for lookahead in range(4):
        working_set, disk = make(sizes, sum(sizes))
        _, loads = run_cyclically(working_set, disk, passes=9, lookahead=lookahead)
        assert loads == [6, 0, 0, 0, 0, 0, 0, 0, 0]
        assert working_set.statistics().num_unused_loads == 0


@pytest.mark.parametrize("num", [2, 3, 5, 8, 13])
def test_on_demand_as_little_is_read_as_any_rule_could(num: int) -> None:
    """With n units in a cycle and room for k, a rule that knows the future reads n - k
    units for each n - 1 uses: Belady's rule evicts the unit that is needed last."""
    for slots in range(1, num + 1):
        working_set, disk = make([1] * num, slots)
        _, loads = run_cyclically(working_set, disk, passes=3 * num, lookahead=0)
        assert sum(loads[-(num - 1) :]) <= num * (num - slots)
        assert sum(loads[1:num]) <= num * (num - slots)


@pytest.mark.parametrize("num", [5, 8, 13])
@pytest.mark.parametrize("lookahead", [1, 2, 3])
def test_looking_ahead_costs_the_slots_it_looks_ahead_into(
    num: int, lookahead: int
) -> None:
    for slots in range(lookahead + 1, num):
        working_set, disk = make([1] * num, slots)
        _, loads = run_cyclically(
            working_set, disk, passes=3 * num, lookahead=lookahead
        )
        kept = slots - lookahead
        assert sum(loads[-(num - 1) :]) <= num * (num - kept)


def test_the_next_unit_is_loaded_while_one_is_read() -> None:
    working_set, disk = make([4, 4, 4], 8, when="when waited for")
    working_set.acquire(0)
    working_set.prefetch([1])
    assert disk.loads == [0, 1]
    working_set.release(0)
    working_set.acquire(1)
    working_set.prefetch([2])
    assert disk.loads == [0, 1, 2]


def test_prefetch_stops_where_everything_is_read_or_awaited() -> None:
    working_set, disk = make([4, 4, 4, 4], 8, when="when waited for")
    working_set.acquire(0)
    working_set.prefetch([1, 2, 3])
    working_set.prefetch([1, 2, 3])
    assert disk.loads == [0, 1]
    assert working_set.statistics().num_unused_loads == 0


def test_prefetch_does_not_throw_out_one_that_is_expected_for_another() -> None:
    working_set, disk = make([4, 4, 4], 8)
    working_set.acquire(1)
    working_set.release(1)
    working_set.acquire(0)
    working_set.prefetch([1, 2])
    working_set.release(0)
    working_set.acquire(1)
    assert disk.loads == [1, 0]


def test_a_wrong_guess_does_not_keep_its_bytes_for_ever() -> None:
    working_set, disk = make([4] * 4, 8)
    working_set.acquire(0)
    working_set.prefetch([3])  # as if 3 came next, but it never runs
    working_set.release(0)
    for unit in [1, 2, 0, 1]:
        working_set.acquire(unit)
        working_set.prefetch([(unit + 1) % 3])
        working_set.release(unit)
    assert disk.loads == [0, 3, 1, 2, 0, 1, 2]  # 2 and 0 on demand, then ahead again
    assert working_set.statistics().num_unused_loads == 1


def test_peak_and_unused_loads_are_counted() -> None:
    working_set, _ = make([4, 6, 8], 12)
    working_set.acquire(0)
    working_set.prefetch([2])
    working_set.release(0)
    working_set.acquire(1)  # leaves no room for 2, which nobody read
    statistics = working_set.statistics()
    assert statistics.capacity_bytes == 12
    assert statistics.peak_bytes == 12
    assert statistics.num_unused_loads == 1


# Loads that fail.


@pytest.mark.parametrize("how", ["fail", "refuse"])
def test_a_failed_load_is_raised_by_the_acquire_that_needs_it(how: str) -> None:
    working_set, disk = make([4, 4, 4], 8, when="when waited for")
    getattr(disk, how).add(1)
    with pytest.raises(ReadError, match="1"):
        working_set.acquire(1)
    working_set.acquire_together((0, 1))  # nothing is lost: all the room is there
    working_set.release_all()
    checker = Checker(working_set, disk)
    for unit in (1, 0, 2, 1):
        checker.enter(unit)
        checker.expect([(unit + 1) % 3])
        checker.leave(unit)
    assert checker.problems == []


@pytest.mark.parametrize("how", ["fail", "refuse"])
def test_a_prefetch_that_fails_is_no_error_until_somebody_needs_it(how: str) -> None:
    working_set, disk = make([4, 4, 4], 8, when="when waited for")
    working_set.acquire(0)
    getattr(disk, how).add(1)
    working_set.prefetch([1, 2])
    working_set.release(0)
    if how == "fail":
        with pytest.raises(ReadError, match="1 is unreadable"):
            working_set.acquire(1)
    assert disk.has(1, working_set.acquire(1))


def test_units_that_are_needed_together_are_acquired_together_or_not_at_all() -> None:
    working_set, disk = make([4, 4, 8], 8)
    disk.fail.add(1)
    with pytest.raises(ReadError, match="1 is unreadable"):
        working_set.acquire_together((0, 1))
    assert not working_set.has_readers
    assert disk.has(2, working_set.acquire(2))  # so all of the arena was free
    working_set.release(2)
    first, second = working_set.acquire_together((0, 1))
    assert disk.has(0, first)
    assert disk.has(1, second)


def test_loads_of_units_needed_together_are_under_way_together() -> None:
    under_way: list[int] = []

    class Watched(FakeLoad):
        def wait(self) -> None:
            under_way.append(len(disk.loads))
            super().wait()

    def load(unit: int, offset: int, after: tuple[Event, ...] = ()) -> FakeLoad:
        found = disk.load(unit, offset)
        found.__class__ = Watched
        return found

    working_set, disk = make([4, 4], 8, when="when waited for")
    working_set._load = load
    working_set.acquire_together((0, 1))
    assert under_way == [2, 2]


# Room.


def test_what_fits_together_finds_room_where_one_stands_in_the_middle() -> None:
    """2 was fetched in between 0 and 1; 3, beside it in one piece, needs it moved."""
    working_set, disk = make([2, 2, 3, 4], 7)
    working_set.acquire(0)
    working_set.acquire(1)
    working_set.prefetch([2])
    working_set.release(0)
    working_set.release(1)
    offsets = working_set.acquire_together((2, 3))
    assert disk.has(2, offsets[0])
    assert disk.has(3, offsets[1])


def test_what_does_not_fit_says_the_least_that_works() -> None:
    working_set, _ = make([10, 20, 30, 40], 60)
    working_set.acquire(0)
    assert working_set.keep(0)
    working_set.acquire(1)
    with pytest.raises(DoesNotFitError) as error:
        working_set.acquire(3)
    message = str(error.value)
    assert "'unit3' needs 40 bytes with 20 in use and 10 resident" in message
    assert "the working set has 60; set device_memory to at least 70" in message

    roomier, _ = make([10, 20, 30, 40], 70)
    for unit in (0, 1, 3):
        roomier.acquire(unit)


def test_a_resident_unit_that_is_read_counts_once_in_what_works() -> None:
    working_set, _ = make([30, 40], 60, needed=[0])
    working_set.acquire(0)
    assert working_set.keep(0)
    with pytest.raises(DoesNotFitError, match=r"at least 70$"):
        working_set.acquire(1)


def test_room_in_pieces_is_not_said_to_be_enough() -> None:
    working_set, _ = make([4, 4, 2, 7], 10)
    for unit in range(3):
        working_set.acquire(unit)
    working_set.release(0)
    working_set.release(1)  # 4 free, 2 read, 4 free
    with pytest.raises(DoesNotFitError, match=r"at least 13$"):
        working_set.acquire(3)


def test_keep_refuses_what_would_leave_no_room_for_the_largest_needed() -> None:
    working_set, _ = make([4, 6, 10], 16)
    working_set.acquire(0)
    working_set.acquire(1)
    assert working_set.keep(0)
    assert not working_set.keep(1)  # 6 would be left for 10
    assert working_set.is_resident(0)
    assert not working_set.is_resident(1)
    assert working_set.statistics().resident_units == (0,)


def test_keep_leaves_room_only_for_what_is_needed() -> None:
    working_set, _ = make([4, 6, 10], 16, needed=[0, 1])
    working_set.acquire(0)
    working_set.acquire(1)
    assert working_set.keep(0)
    assert working_set.keep(1)


def test_keep_leaves_room_for_units_that_a_site_needs_together() -> None:
    working_set, _ = make([4, 6, 6], 15)
    sites = [Site("a", (0,)), Site("b", (1, 2))]
    OpenSites(sites, working_set, bind=lambda site, at: None, unbind=lambda site: None)
    working_set.acquire(0)
    assert not working_set.keep(0)
    working_set.release(0)
    working_set.acquire_together((1, 2))


@given(st.data())
def test_units_that_are_needed_together_have_room_one_after_the_other(
    data: st.DataObject,
) -> None:
    """A layer's own unit stays where its experts, one at a time, have room beside it,
    whatever lay there before and stays."""
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=4, max_size=9), "sizes")
    staying = data.draw(st.sets(st.integers(0, len(sizes) - 1), max_size=2), "staying")
    numbers = st.integers(0, len(sizes) - 1)
    layer = st.lists(numbers, min_size=2, max_size=4, unique=True)
    layers = data.draw(st.lists(layer, min_size=1, max_size=4), "layers")
    groups = [(own, expert) for own, *experts in layers for expert in experts]
    least = max(
        sum(sizes[unit] for unit in group if unit not in staying) for group in groups
    )
    capacity = least + sum(sizes[unit] for unit in staying)
    working_set, _ = make(sizes, capacity, staying=staying, needed=())
    working_set.need_together(groups)
    for _ in range(3):
        for own, *experts in data.draw(st.permutations(layers), "order"):
            ahead = data.draw(st.lists(numbers, max_size=3), "ahead")
            working_set.prefetch(ahead)
            working_set.acquire(own)
            for expert in experts:
                working_set.acquire(expert)
                working_set.release(expert)
            working_set.release(own)


def test_a_resident_unit_is_never_thrown_out() -> None:
    working_set, disk = make([4] * 6, 12)
    working_set.acquire(5)
    assert working_set.keep(5)
    working_set.release(5)
    _, loads = run_cyclically(working_set, disk, passes=4, lookahead=1)
    assert disk.loads.count(5) == 1
    assert loads[-1] < 6


# The end.


def test_close_waits_for_what_is_under_way() -> None:
    working_set, disk = make([4, 4], 8, when="when waited for")
    working_set.prefetch([0, 1])
    assert len(disk.pending) == 2
    working_set.close()
    assert disk.pending == []
    working_set.close()


def test_nothing_is_acquired_after_close_but_readers_may_still_leave() -> None:
    working_set, _ = make([4, 4], 8)
    working_set.acquire(0)
    working_set.close()
    working_set.release(0)
    working_set.prefetch([1])
    with pytest.raises(ClosedError, match="load it again"):
        working_set.acquire(0)


def test_a_release_too_many_is_a_mistake_of_ours() -> None:
    working_set, _ = make([4], 4)
    working_set.acquire(0)
    working_set.release(0)
    with pytest.raises(AssertionError, match="unit 0 was released more often"):
        working_set.release(0)


def test_readers_that_an_interrupt_cut_off_are_forgotten() -> None:
    working_set, disk = make([4, 8], 8)
    working_set.acquire(0)
    assert working_set.has_readers
    working_set.release_all()
    assert not working_set.has_readers
    assert disk.has(1, working_set.acquire(1))


def test_an_interrupted_wait_leaves_a_unit_that_can_be_read() -> None:
    working_set, disk = make([4, 4, 4], 8, when="when waited for")
    checker = Checker(working_set, disk)

    class Interrupted(FakeLoad):
        def wait(self) -> None:
            raise KeyboardInterrupt

    def load(unit: int, offset: int, after: tuple[Event, ...] = ()) -> FakeLoad:
        disk.pending.append(found := Interrupted(disk, unit, offset, None))
        return found

    working_set._load = load
    with pytest.raises(KeyboardInterrupt):
        working_set.acquire(0)
    working_set._load = disk.load
    for unit in (0, 1, 2, 0):
        checker.enter(unit)
        checker.leave(unit)
    assert checker.problems == []
    assert disk.pending == []


def test_loads_of_other_threads_in_any_order_never_deadlock() -> None:
    sizes, capacity = [8, 16, 8, 24, 8, 16], 48
    memory = bytearray(capacity)
    go = threading.Semaphore(0)

    with ThreadPoolExecutor(3, "loads") as pool:

        def load(unit: int, offset: int, after: tuple[Event, ...] = ()) -> UnitLoad:
            handle = Handle(1)

            def write() -> None:
                go.acquire()
                end = offset + sizes[unit]
                memory[offset:end] = bytes([stamp(unit)]) * sizes[unit]
                handle.done()

            pool.submit(write)
            go.release()
            return UnitLoad("", [handle])

        working_set = WorkingSet(
            sizes,
            names=[""] * len(sizes),
            capacity=capacity,
            load=load,
            mark=lambda: None,
            needed=frozenset(range(len(sizes))),
        )
        for _ in range(50):
            for unit, nbytes in enumerate(sizes):
                offset = working_set.acquire(unit)
                working_set.prefetch([(unit + 1) % 6, (unit + 2) % 6])
                found = memory[offset : offset + nbytes]
                assert found == bytes([stamp(unit)]) * nbytes
                working_set.release(unit)
        working_set.close()


def test_what_is_held_is_shown() -> None:
    working_set, _ = make([4, 4], 8)
    working_set.acquire(1)
    assert repr(working_set) == "<WorkingSet: [1] in <Slots: 1, 4/8 bytes>>"
