"""Reads this rank's part of units from files."""

import mmap
import queue
import threading
import time
from collections.abc import Callable

import torch

from ...io.closing import Closing
from ...io.handle import Handle, forget_traceback
from ...io.pace import Pace
from ...io.readers.reader import Reader
from ...io.tier import Tier
from ...io.timeline import Record
from .gather_plan import GatherPlan


class OwnPart:
    """The bytes of a unit that this rank reads."""

    def __init__(self, plan: GatherPlan, rank: int) -> None:
        self.name = plan.name
        self.start, self.end = plan.part(rank)
        self.nbytes = self.end - self.start
        memory = memoryview(mmap.mmap(-1, max(self.nbytes, 1)))  # aligned to pages
        self.memory = memory[: self.nbytes]
        self.handles: list[Handle] = []
        self.is_done = False
        self.error: Exception | None = None
        """Why it could not be read, once it is done."""
        self.begun = time.perf_counter()

    @property
    def tensor(self) -> torch.Tensor:
        """The bytes, once they are read: uint8 of one dimension."""
        if not self.nbytes:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        return torch.frombuffer(self.memory, dtype=torch.uint8)


class OwnParts(Closing):
    """Reads parts with `reader`, and calls `then` when one is done. `pace` limits the
    speed, if given. A thread waits for the reads."""

    def __init__(
        self,
        reader: Reader,
        rank: int,
        pace: Pace | None,
        record: Record,
        then: Callable[[], None],
    ) -> None:
        self._reader = reader
        self._rank = rank
        self._pace = pace
        self._record = record
        self._then = then
        self._parts: queue.SimpleQueue[OwnPart | None] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._work, name="penstock-own-part", daemon=True
        )
        self._thread.start()

    def read(self, plan: GatherPlan) -> OwnPart:
        """Starts to read this rank's part of the unit of `plan`."""
        part = OwnPart(plan, self._rank)
        at = 0
        try:
            for extent in plan.extents(part.start, part.end):
                view = part.memory[at : at + extent.nbytes]
                part.handles.append(self._reader.submit(extent, view, urgent=True))
                at += extent.nbytes
        except Exception as error:
            part.error = error
        self._parts.put(part)
        return part

    def close(self) -> None:
        """Finishes the reads under way and ends the thread."""
        self._parts.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (part := self._parts.get()) is not None:
            for handle in part.handles:
                handle.wait_quietly()
            try:
                for handle in part.handles:
                    handle.wait()
                if self._pace is not None:
                    end = self._pace.end_of(part.nbytes, part.begun)
                    time.sleep(max(0.0, end - time.perf_counter()))
            except Exception as error:
                forget_traceback(error)
                part.error = part.error or error
            now = time.perf_counter()
            self._record(Tier.DISK, part.name, part.begun, now, part.nbytes)
            part.is_done = True
            self._then()
            del part
