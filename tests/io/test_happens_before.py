"""Every edge that a GPU needs, checked on a device that records them: a copy waits for
the last kernel that read its slot, a kernel for the copy, a staging buffer for both.

Each rule is also broken on purpose, and the recording device must notice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
import torch

from penstock.io.event import Event
from penstock.io.memory.arena import Arena, HostMemory, Memory
from penstock.io.weights.layout import Layout, Placed
from penstock.io.weights.link import Link, LinkLoad
from penstock.io.weights.peer import PeerTier
from penstock.io.weights.source import ResidentSource, StagedSource
from penstock.io.weights.steps import LoadSteps
from penstock.io.weights.transfer import Transfer, packed, same_layout
from penstock.scheduler.slots.working_set import WorkingSet
from recording import RecordingDevice, range_of

pytestmark = pytest.mark.usefixtures("no_leaks")


def stamp(unit: int) -> int:
    return unit % 250 + 1


class FakeUnitLoad:
    """A read that is done when it is waited for, like one by another thread."""

    def __init__(self, write: Callable[[], None]) -> None:
        self._write = write
        self._lock = threading.Lock()
        self._is_done = False

    def wait(self) -> None:
        with self._lock:
            if not self._is_done:
                self._is_done = True
                self._write()

    wait_quietly = wait


class FakeLoader:
    """Writes a unit's stamp into staging memory; the bytes are touched by the host."""

    def __init__(
        self, layouts: Sequence[Layout], memory: HostMemory, device: RecordingDevice
    ) -> None:
        self._layouts = layouts
        self._memory = memory
        self._device = device

    def load(self, unit: int, offset: int) -> Any:
        target = self._memory.tensor(offset, self._layouts[unit].nbytes)
        self._device.host_writes(range_of(target), f"read of unit {unit}")

        def write() -> None:
            target.fill_(stamp(unit))

        return FakeUnitLoad(write)

    def close(self) -> None:
        pass


def layout_of(unit: int, nbytes: int) -> Layout:
    half = nbytes // 2 // 16 * 16
    parts = (("a", 5, half - 5), ("b", half + 3, nbytes - half - 3))
    tensors = tuple(
        Placed(f"{unit}.{name}", offset, torch.uint8, (length,))
        for name, offset, length in parts
    )
    return Layout.of(f"unit{unit}", nbytes, LoadSteps(), tensors, nbytes)


@dataclass
class Plan:
    """A shape: unit sizes, who stands where, and how much room there is."""

    sizes: list[int]
    tiers: list[str]
    capacity: int
    staging: int
    lookahead: int


def plan_of(random: Random) -> Plan:
    num = random.randrange(1, 12)
    sizes = [random.randrange(2, 9) * 64 for _ in range(num)]
    tiers = [random.choice(["disk", "host", "peer", "device"]) for _ in range(num)]
    stay = sum(n + 64 for n, t in zip(sizes, tiers, strict=True) if t == "device")
    largest = max(sizes) + 64
    capacity = stay + largest * random.randrange(1, 5)
    return Plan(
        sizes, tiers, capacity, largest * random.randrange(1, 4), random.randrange(4)
    )


@dataclass
class Machine:
    device: RecordingDevice
    memory: Memory
    working_set: WorkingSet
    transfers: list[Transfer]
    plan: Plan
    wrong: list[int]

    def compute(self, unit: int, offset: int) -> None:
        """A kernel that reads the unit: it must find the unit's stamp everywhere."""
        views = [
            self.memory.tensor(offset + p.offset, torch.Size(p.shape).numel())
            for p in self.transfers[unit].tensors
        ]

        def act() -> None:
            if any((view != stamp(unit)).any() for view in views):
                self.wrong.append(unit)

        reads = [range_of(view) for view in views]
        self.device.compute.give(act, reads, [], f"kernel of unit {unit}")

    def sweep(self, passes: int) -> None:
        num = len(self.plan.sizes)
        for step in range(passes * num):
            unit = step % num
            offset = self.working_set.acquire(unit)
            ahead = range(step + 1, step + 1 + self.plan.lookahead)
            self.working_set.prefetch(
                [u for u in dict.fromkeys(s % num for s in ahead) if u != unit]
            )
            self.compute(unit, offset)
            self.working_set.release(unit)
            self.device.run(self.device.random.randrange(4))


@contextmanager
def machine(
    plan: Plan,
    seed: int,
    *,
    change_link: Callable[[Link], None] = lambda link: None,
    change_set: Callable[[WorkingSet], None] = lambda working_set: None,
) -> Iterator[Machine]:
    device = RecordingDevice(Random(seed))
    layouts = [layout_of(u, n) for u, n in enumerate(plan.sizes)]
    transfers = [packed(p, alignment=64, max_gap_bytes=16) for p in layouts]
    ways = dict(enumerate(transfers))
    memory = device.allocate(plan.capacity)

    def from_disk(target: Memory, to: Any) -> Link:
        staging = Arena(plan.staging)
        loader: Any = FakeLoader(layouts, staging, device)
        source = StagedSource(loader, layouts, staging)
        return Link("disk", source, ways, target, to, pace=None)

    def units_of(tier: str) -> list[int]:
        return [u for u, t in enumerate(plan.tiers) if t == tier]

    host = Arena(sum(plan.sizes))
    offsets, end = {}, 0
    for unit in units_of("host"):
        host.tensor(end, plan.sizes[unit]).fill_(stamp(unit))
        offsets[unit], end = end, end + plan.sizes[unit]
    links = {
        "disk": from_disk(memory, device),
        "host": Link(
            "host", ResidentSource(host, offsets), ways, memory, device, pace=None
        ),
    }
    peer = None
    if units_of("peer"):
        peer = PeerTier(
            ways,
            units_of("peer"),
            device,
            open_link=from_disk,
            progress=lambda done, total: None,
        )
        there = {unit: same_layout(transfers[unit]) for unit in units_of("peer")}
        kept = ResidentSource(peer.memory, peer.offsets)
        links["peer"] = Link("peer", kept, there, memory, device, pace=None)
    for link in links.values():
        change_link(link)
    working_set = WorkingSet(
        [t.nbytes for t in transfers],
        names=[t.name for t in transfers],
        capacity=plan.capacity,
        load=lambda unit, offset, after: links.get(
            plan.tiers[unit], links["disk"]
        ).load(unit, offset, after),
        mark=device.compute.record,
        needed=frozenset(range(len(transfers))),
        staying=units_of("device"),
    )
    change_set(working_set)
    found = Machine(device, memory, working_set, transfers, plan, [])
    try:
        yield found
    finally:
        working_set.close()
        device.synchronize()
        for link in links.values():
            link.close()
        if peer is not None:
            peer.close()
        host.close()
        memory.close()


@pytest.mark.parametrize("seed", range(60))
def test_every_access_waits_for_what_it_must(seed: int) -> None:
    with machine(plan_of(Random(seed)), seed) as found:
        found.sweep(4)
        found.device.synchronize()
    assert found.device.problems == []
    assert found.wrong == []


@pytest.mark.parametrize("seed", range(20))
def test_only_loading_threads_ever_wait_for_the_device(seed: int) -> None:
    with machine(plan_of(Random(seed)), seed) as found:
        found.device.num_host_waits.clear()
        found.sweep(4)
        waited = set(found.device.num_host_waits)
    assert waited <= {"penstock-link-disk"}, "for its staging buffers, nobody else"


# Each rule broken on purpose.

TIGHT = Plan([512, 256, 512, 384], ["disk", "host", "peer", "disk"], 1300, 600, 2)


def forget_readers(working_set: WorkingSet) -> None:
    """A copy that does not wait for the last kernel that read the slot."""
    working_set._mark = lambda: None


def forget_copies(link: Link) -> None:
    """A kernel that does not wait for the copy."""
    load = link.load

    def load_without_event(unit: int, offset: int, after: tuple[Event, ...]) -> Any:
        found = load(unit, offset, after)
        found.wait = found.wait_quietly  # type: ignore[method-assign]
        return found

    link.load = load_without_event  # type: ignore[method-assign]


def forget_order(link: Link) -> None:
    """A copy that does not wait for what was read or copied there before."""
    load = link.load

    def load_at_once(unit: int, offset: int, after: tuple[Event, ...]) -> LinkLoad:
        return load(unit, offset, ())

    link.load = load_at_once  # type: ignore[method-assign]


def forget_staging(link: Link) -> None:
    """A staging buffer that is filled while it is still being copied from."""
    give_back = link._source.give_back
    link._source.give_back = lambda event: give_back(None)  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("change", "sign"),
    [
        ({"change_set": forget_readers}, "does not wait for kernel"),
        ({"change_link": forget_copies}, "does not wait for copy"),
        ({"change_link": forget_order}, "does not wait for"),
        ({"change_link": forget_staging}, "read of unit"),
    ],
)
def test_a_planted_bug_is_caught(change: dict[str, Any], sign: str) -> None:
    problems: list[str] = []
    for seed in range(5):
        with machine(TIGHT, seed, **change) as found:
            found.sweep(4)
        problems += found.device.problems
    assert any(sign in problem for problem in problems)


def test_memory_that_is_overwritten_too_early_is_read_wrong() -> None:
    """The vector clocks do not only say so: the bytes are wrong, too."""
    wrong: list[int] = []
    for seed in range(30):
        with machine(TIGHT, seed, change_set=forget_readers) as found:
            found.sweep(4)
            found.device.synchronize()
        wrong += found.wrong
    assert wrong
