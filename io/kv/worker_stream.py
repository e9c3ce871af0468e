"""A thread that runs work in order: a stream for devices that have none."""

import ctypes
import queue
import threading
import time
from collections.abc import Callable

import torch

from ..closing import Closing
from ..errors import ClosedError
from ..event import Event
from ..handle import Handle, forget_frames
from ..pace import Pace
from ..timeline import Record, unrecorded

_Job = tuple[Callable[[], None], int, bool, Handle]


class WorkerStream(Closing):
    """Runs work on a thread of its own, in the order in which it was given.

    `give` returns a handle, which raises the error of that work; later work still runs.
    `give` waits while more than `max_pending_bytes` are pending. The methods of a
    `Stream` copy host memory, no faster than `pace` allows.
    """

    def __init__(
        self,
        name: str,
        *,
        max_pending_bytes: int,
        pace: Pace | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.perf_counter,
        record: Record = unrecorded,
    ) -> None:
        self._name = name
        self._record = record
        self._pace = pace
        self._sleep = sleep
        self._clock = clock
        self._max_pending_bytes = max_pending_bytes
        self._pending_bytes = 0
        self._room = threading.Condition()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._last = Handle(0)
        self._is_closed = False
        self._thread = threading.Thread(
            target=self._work, name=f"penstock-{name}", daemon=True
        )
        self._thread.start()

    def give(
        self, act: Callable[[], None], nbytes: int = 0, *, is_work: bool = True
    ) -> Handle:
        """Runs `act` after all earlier work.

        `nbytes` is the memory that the work keeps until it is done. With `is_work`
        False, `act` only waits for other work, and is not recorded in the timeline.
        Raises ClosedError after `close`.
        """
        handle = Handle(1)
        with self._room:
            while (
                nbytes
                and self._pending_bytes
                and (self._pending_bytes + nbytes > self._max_pending_bytes)
            ):
                self._room.wait()
            if self._is_closed:
                raise ClosedError("this model is closed; load it again")
            self._pending_bytes += nbytes
            self._last = handle
            self._jobs.put((act, nbytes, is_work, handle))
        return handle

    # The methods of a Stream.

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies `source` to `target`: host memory, contiguous, equally many bytes."""
        assert target.nbytes == source.nbytes, "copies need equally many bytes"
        given = self._clock()

        def act() -> None:
            ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)
            if self._pace is not None:
                end = self._pace.end_of(source.nbytes, given)
                self._sleep(max(0.0, end - self._clock()))

        self.give(act, source.nbytes)

    def run(self, work: Callable[[], None]) -> None:
        self.give(work)

    def record(self) -> Event:
        """An event that passes when all work given so far is done."""
        return self._last

    def wait(self, event: Event) -> None:
        """Makes later work begin after `event`. Does not block."""
        self.give(event.wait, is_work=False)

    def close(self) -> None:
        """Finishes the given work and ends the thread."""
        with self._room:
            if self._is_closed:
                return
            self._is_closed = True
            self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            act, nbytes, is_work, handle = job
            error: BaseException | None = None
            start = self._clock()
            try:
                act()
            except (
                BaseException
            ) as caught:  # raised again where the handle is waited for
                forget_frames(caught)
                error = caught
            del act, job
            if is_work:
                end = self._clock()
                self._record(self._name, "keys and values", start, end, nbytes)
            with self._room:
                self._pending_bytes -= nbytes
                self._room.notify_all()
            handle.done(error)
            del handle, error
