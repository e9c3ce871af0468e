"""Where a link gets the bytes of its units from."""

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from ..event import Event
from ..handle import Handle
from ..memory.arena import HostMemory, Memory
from ..memory.pinned import Pinned
from .layout import Layout
from .loader import Loader, UnitLoad
from .ring import Ring


class Source(Protocol):
    """Lends the bytes of units, in the order in which they were asked for."""

    def ask(self, unit: int) -> bool:
        """Starts to get `unit` ready. False when there is no room for that yet: it is
        asked for again, before any other, when the oldest was given back. What fails
        is raised by `get`."""
        ...

    def get(self, unit: int) -> tuple[Memory, int]:
        """Waits for the oldest one asked for and not got: its memory and offset."""
        ...

    def cut(self, offset: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """A range of that memory as ranges (offset, bytes) that can each be copied in
        one piece: memory that is pinned in pieces cannot in any other."""
        ...

    def give_back(self, event: Event | None) -> None:
        """The oldest one got, or failed to be got (None), has been read when `event`
        has passed."""
        ...

    def close(self) -> None: ...


class ResidentSource:
    """Units that stay where they are, `offsets` into `memory`."""

    def __init__(
        self,
        memory: Memory,
        offsets: Mapping[int, int],
        *,
        pinned: Pinned | None = None,
    ) -> None:
        self._memory = memory
        self._offsets = offsets
        self._pinned = pinned

    def ask(self, unit: int) -> bool:
        return True

    def get(self, unit: int) -> tuple[Memory, int]:
        return self._memory, self._offsets[unit]

    def cut(self, offset: int, nbytes: int) -> Iterator[tuple[int, int]]:
        return _cut(self._pinned, offset, nbytes)

    def give_back(self, event: Event | None) -> None:
        pass

    def close(self) -> None:
        if self._pinned is not None:
            self._pinned.close()


class StagedSource:
    """Units read from disk into a ring of host memory, as many ahead as fit there.

    `ask` may be called by any thread, the rest by the one that copies: the only one
    that ever waits for the device, to use the ring again.
    """

    def __init__(
        self,
        loader: Loader,
        layouts: Sequence[Layout],
        memory: HostMemory,
        *,
        pinned: Pinned | None = None,
    ) -> None:
        self._loader = loader
        self._pinned = pinned
        self._layouts = layouts
        self._memory = memory
        self._ring = Ring(memory.nbytes)
        self._lock = threading.Lock()
        self._under_way: deque[tuple[int, UnitLoad]] = deque()

    def ask(self, unit: int) -> bool:
        with self._lock:
            offset = self._ring.take(self._layouts[unit].nbytes)
            if offset is None:
                return False
            try:
                load = self._loader.load(unit, offset)
            except Exception as error:  # raised by who waits for it
                failed = Handle(1)
                failed.done(error)
                load = UnitLoad(self._layouts[unit].name, [failed])
            self._under_way.append((offset, load))
            return True

    def get(self, unit: int) -> tuple[Memory, int]:
        offset, load = self._under_way[0]
        load.wait()
        return self._memory, offset

    def cut(self, offset: int, nbytes: int) -> Iterator[tuple[int, int]]:
        return _cut(self._pinned, offset, nbytes)

    def give_back(self, event: Event | None) -> None:
        try:
            if event is not None:
                event.wait()
        finally:
            with self._lock:
                self._under_way.popleft()
                self._ring.give_back()

    def close(self) -> None:
        for _, load in self._under_way:
            load.wait_quietly()
        self._loader.close()
        if self._pinned is not None:
            self._pinned.close()
        self._memory.close()


def _cut(pinned: Pinned | None, offset: int, nbytes: int) -> Iterator[tuple[int, int]]:
    if pinned is None:
        yield offset, nbytes
        return
    for start, length, _ in pinned.cut(offset, nbytes):
        yield start, length
