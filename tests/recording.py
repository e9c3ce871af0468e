"""A device that does its work late, in any order that its streams and events allow, and
that knows of every access what had to come before it.

Work is queued, as on a GPU; `run` does some of it, at random. Each piece of work has a
vector clock, so a missing edge is found even on a run where luck ordered things right:

- what writes comes after all that read or wrote the same bytes;
- what reads comes after all that wrote them;
- nothing touches memory that was given back.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import torch

from penstock.io.event import Event
from penstock.io.memory.arena import Arena, HostMemory, Memory
from penstock.io.memory.pinned import Pinned

Clock = dict[str, int]


def join(*clocks: Clock) -> Clock:
    names = {name for clock in clocks for name in clock}
    return {name: max(clock.get(name, 0) for clock in clocks) for name in names}


@dataclass
class Access:
    who: str
    tick: int
    start: int
    end: int
    is_write: bool
    what: str


@dataclass(eq=False)
class Work:
    act: Callable[[], None]
    ranges: list[Range]
    is_done: bool = False


@dataclass(eq=False)
class FakeEvent:
    device: RecordingDevice
    clock: Clock
    last: Work | None
    stream: str = ""

    def wait(self) -> None:
        """The host waits: the device has to do all that lies before."""
        self.device.run_until(self.last)
        self.device.learn(self.clock)


class FakeStream:
    def __init__(self, device: RecordingDevice, name: str) -> None:
        self.device = device
        self.name = name
        self.clock: Clock = {}
        self.queue: deque[tuple[Work, list[Work]]] = deque()
        self.last: Work | None = None
        self.waits: list[Work] = []

    def give(
        self,
        act: Callable[[], None],
        reads: list[Range],
        writes: list[Range],
        what: str,
    ) -> None:
        """Queues `act`, which touches these addresses."""
        device = self.device
        with device.lock:
            # It cannot begin before it was given: after all that the host knows of.
            self.clock = join(self.clock, device.done)
            self.clock[self.name] = self.clock.get(self.name, 0) + 1
            for where, is_write in [(r, False) for r in reads] + [
                (w, True) for w in writes
            ]:
                device.check(self, where, is_write, what)
            work = Work(act, [*reads, *writes])
            self.queue.append((work, self.waits))
            self.waits = []
            self.last = work

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        def act() -> None:
            target.copy_(source)

        self.give(act, [range_of(source)], [range_of(target)], f"copy on {self.name}")

    def run(self, work: Callable[[], None]) -> None:
        self.give(work, [], [], f"work on {self.name}")

    def record(self) -> Event:
        with self.device.lock:
            return FakeEvent(self.device, dict(self.clock), self.last, self.name)

    def wait(self, event: Event) -> None:
        assert isinstance(event, FakeEvent)
        with self.device.lock:
            self.clock = join(self.clock, event.clock)
            if event.last is not None and not event.last.is_done:
                self.waits = [*self.waits, event.last]


Range = tuple[int, int]


def range_of(tensor: torch.Tensor) -> Range:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.itemsize


@dataclass
class RecordingDevice:
    """`is_host` is False, as of a GPU, but its memory is the host's."""

    random: Random
    name: str = "fake:0"
    is_host: bool = False
    problems: list[str] = field(default_factory=list)
    num_host_waits: dict[str, int] = field(default_factory=dict)
    """Times that each thread waited for the device."""

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.accesses: list[Access] = []
        self.streams: list[FakeStream] = []
        self.done: Clock = {}
        """What a thread of the host has waited for: done is done for all of them."""
        self.compute_stream = self.stream("compute")

    @property
    def compute(self) -> FakeStream:
        return self.compute_stream

    def stream(self, name: str = "") -> FakeStream:
        with self.lock:
            made = FakeStream(self, name or f"copies {len(self.streams)}")
            self.streams.append(made)
            return made

    def allocate(self, nbytes: int) -> Memory:
        return Arena(nbytes)

    def pin(self, memory: HostMemory, max_bytes: int) -> Pinned | None:
        return None

    def settle(self, memory: HostMemory) -> str | None:
        return None

    def free_bytes(self) -> int | None:
        return None

    def resize(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        """In the order of the compute stream, as an allocator does it that keeps what
        is given back for that stream. The memory is the host's and really goes: what is
        queued for it is done first, in what order it likes."""
        where = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        with self.lock:
            self.compute_stream.give(lambda: None, [], [where], "giving memory back")
            for stream in self.streams:
                for work, _ in list(stream.queue):
                    if any(a < where[1] and where[0] < b for a, b in work.ranges):
                        self.run_until(work)
            storage.resize_(nbytes)

    def peak_bytes(self) -> int | None:
        return None

    def synchronize(self) -> None:
        self.run_until(None, everything=True)

    def learn(self, clock: Clock) -> None:
        with self.lock:
            self.done = join(self.done, clock)
            name = threading.current_thread().name
            self.num_host_waits[name] = self.num_host_waits.get(name, 0) + 1

    # What has to come before what.

    def check(
        self, stream: FakeStream, where: Range, is_write: bool, what: str
    ) -> None:
        start, end = where
        kept = []
        for access in self.accesses:
            overlaps = access.start < end and start < access.end
            if overlaps and (is_write or access.is_write):
                if stream.clock.get(access.who, 0) < access.tick:
                    self.problems.append(f"{what} does not wait for {access.what}")
                elif is_write and start <= access.start and access.end <= end:
                    continue  # whoever comes after this write comes after that, too
            kept.append(access)
        tick = stream.clock[stream.name]
        kept.append(Access(stream.name, tick, start, end, is_write, what))
        self.accesses = kept

    def host_writes(self, where: Range, what: str) -> None:
        """A thread of the host writes there now."""
        with self.lock:
            for access in self.accesses:
                overlaps = access.start < where[1] and where[0] < access.end
                if overlaps and self.done.get(access.who, 0) < access.tick:
                    self.problems.append(f"{what} does not wait for {access.what}")

    # Doing the work.

    def run(self, steps: int) -> None:
        """Does up to `steps` pieces of work, of any streams that may go on."""
        for _ in range(steps):
            with self.lock:
                able = [
                    stream
                    for stream in self.streams
                    if stream.queue and all(w.is_done for w in stream.queue[0][1])
                ]
                if not able:
                    return
                self._do(self.random.choice(able))

    def run_until(self, last: Work | None, *, everything: bool = False) -> None:
        while everything or (last is not None and not last.is_done):
            with self.lock:
                able = [
                    stream
                    for stream in self.streams
                    if stream.queue and all(w.is_done for w in stream.queue[0][1])
                ]
                if not able:
                    assert not any(s.queue for s in self.streams), "streams deadlock"
                    return
                self._do(self.random.choice(able))

    def _do(self, stream: FakeStream) -> None:
        work, _ = stream.queue.popleft()
        work.act()
        work.is_done = True
