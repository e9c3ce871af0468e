"""Copies units from one tier into slots of a device while the device computes."""

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..closing import Closing
from ..codecs.kernels import Kernels
from ..codecs.tiles import TILES
from ..devices.device import Device
from ..errors import ClosedError, PenstockError
from ..event import Event
from ..handle import Handle, forget_frames
from ..memory.arena import Memory
from ..pace import Pace
from ..tier import Tier
from ..timeline import STAGING, Record, unrecorded
from .source import Source
from .transfer import Transfer
from .unpacking import Image, Unpacker


class LinkLoad:
    """The load of one unit into its slot.

    It is done once its copy is queued on the link's stream and, if the link's speed is
    limited, the time of the copy is over. The compute stream waits for the copy itself;
    the host does not.
    """

    def __init__(self, unit_name: str, device: Device) -> None:
        self.ready: Event | None = None
        """Passes when the last byte has arrived; None until the copy is queued."""
        self.handle = Handle(1)
        self._unit_name = unit_name
        self._device = device

    @property
    def is_done(self) -> bool:
        """Whether `wait` returns, or raises, at once."""
        return self.handle.is_done

    def wait(self) -> None:
        """Waits until the copy is queued, and makes the compute stream wait for it.

        Raises PenstockError if reading or copying failed.
        """
        try:
            self.handle.wait()
        except PenstockError:
            raise
        except Exception as error:
            raise PenstockError(
                f"unit {self._unit_name!r} could not be copied: {error!r}"
            ) from error
        assert self.ready is not None, "a load without an error has an event"
        self._device.compute.wait(self.ready)

    def wait_quietly(self) -> None:
        """Waits until all writes into the slot are queued; `ready` comes after them."""
        self.handle.wait_quietly()


@dataclass(frozen=True, slots=True)
class LinkStatistics:
    """Counters since the link was opened."""

    bytes_moved: int
    num_copies: int


@dataclass(frozen=True, slots=True)
class _Job:
    unit: int
    offset: int
    after: tuple[Event, ...]
    load: LinkLoad
    given: float


class Link(Closing):
    """Copies units from `source` to `target`, which is memory of `device`.

    The link has a thread and a stream of its own, and copies units in the order of the
    calls of `load`. A copy begins when the earlier work on the slot is done: the stream
    waits for that work, the host does not. `pace` limits the speed, if given. The
    recorded spans end when a copy is queued; on a CPU it is then also done.
    """

    def __init__(
        self,
        tier: str,
        source: Source,
        transfers: Mapping[int, Transfer],
        target: Memory,
        device: Device,
        *,
        pace: Pace | None,
        kernels: Kernels = TILES,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.perf_counter,
        record: Record = unrecorded,
    ) -> None:
        self.tier = tier
        self._lane = STAGING if tier == Tier.DISK else tier
        self._source = source
        self._transfers = transfers
        self._target = target
        self._device = device
        self._stream = device.stream()
        self._unpacker = Unpacker(device, target, self._stream, kernels)
        self._pace = pace
        self._sleep = sleep
        self._clock = clock
        self._record = record
        self._lock = threading.Lock()
        self._not_asked: deque[int] = deque()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._statistics = LinkStatistics(0, 0)
        self._is_closed = False
        self._thread = threading.Thread(
            target=self._work, name=f"penstock-link-{tier}", daemon=True
        )
        self._thread.start()

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "open"
        return f"<Link: {self.tier} to {self._device.name}, {state}>"

    def load(self, unit: int, offset: int, after: tuple[Event, ...]) -> LinkLoad:
        """Starts to copy `unit` to `offset` (bytes) of the target.

        Its bytes there may be overwritten once all events of `after` have passed.
        Raises ClosedError after `close`.
        """
        load = LinkLoad(self._transfers[unit].name, self._device)
        with self._lock:
            if self._is_closed:
                raise ClosedError(f"the link from {self.tier} is closed")
            self._not_asked.append(unit)
            self._jobs.put(_Job(unit, offset, after, load, self._clock()))
        self._ask_ahead()
        return load

    def mark(self) -> Event:
        """An event that passes when all copies queued so far are done."""
        return self._stream.record()

    def statistics(self) -> LinkStatistics:
        return self._statistics

    def close(self) -> None:
        """Finishes the loads under way and ends the thread."""
        with self._lock:  # no job may be queued behind the end mark
            if self._is_closed:
                return
            self._is_closed = True
            self._jobs.put(None)
        self._thread.join()
        self._source.close()
        self._unpacker.close()

    def _ask_ahead(self) -> None:
        with self._lock:
            while self._not_asked and self._source.ask(self._not_asked[0]):
                self._not_asked.popleft()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._ask_ahead()  # once no older unit is left, this one has room
            error: BaseException | None = None
            try:
                self._copy(job)
            except BaseException as caught:  # raised again where the unit is waited for
                forget_frames(caught)
                error = caught
            job.load.handle.done(error)
            # An error here comes from the device; every later copy raises it, too.
            with contextlib.suppress(Exception):
                self._source.give_back(job.load.ready)
            del job

    def _copy(self, job: _Job) -> None:
        memory, start = self._source.get(job.unit)
        transfer = self._transfers[job.unit]
        begun = self._clock()
        try:
            for event in job.after:
                self._stream.wait(event)
            image = Image(memory, start, self._source.cut)
            self._unpacker.fill(transfer, image, job.offset)
        finally:  # copies already queued still write if a later one failed
            job.load.ready = self._stream.record()
        nbytes = transfer.moved_bytes
        if self._pace is not None:
            # A drive reads the stored bytes, which a cast may have changed in number.
            paced = transfer.stored_bytes if self.tier == Tier.DISK else nbytes
            end = self._pace.end_of(paced, job.given)
            self._sleep(max(0.0, end - self._clock()))
        self._statistics = LinkStatistics(
            self._statistics.bytes_moved + nbytes,
            self._statistics.num_copies + len(transfer.runs),
        )
        self._record(self._lane, transfer.name, begun, self._clock(), nbytes)
