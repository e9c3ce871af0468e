"""Provides the bytes of units to a link."""

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from ..event import Event
from ..handle import Handle
from ..memory.arena import HostMemory, Memory
from ..memory.pinned import Pinned
from ..memory.ring import Ring
from .layout import Layout
from .loader import Loader, UnitLoad


class Source(Protocol):
    """Lends the memory of units, in the order in which `ask` was called for them."""

    def ask(self, unit: int) -> bool:
        """Starts to make `unit` available.

        Returns False when there is no room yet. The caller then asks again after a
        `give_back`, before it asks for any other unit. Errors are raised by `get`.
        """
        ...

    def get(self, unit: int) -> tuple[Memory, int]:
        """Waits for the oldest requested unit.

        Returns the memory that holds it, and its offset there in bytes.
        """
        ...

    def cut(self, offset: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """Splits a range of that memory into ranges (offset, bytes) to copy one by one.

        One copy must not cross the border between two separately pinned blocks.
        """
        ...

    def give_back(self, event: Event | None) -> None:
        """Returns the oldest unit of `get`: its memory is free once `event` has passed.

        `event` is None when `get` failed.
        """
        ...

    def close(self) -> None: ...


class ResidentSource:
    """Units that stay in `memory`, each at its offset (bytes) in `offsets`; those in
    `moved` have memory of their own."""

    def __init__(
        self,
        memory: Memory,
        offsets: Mapping[int, int],
        moved: Mapping[int, Memory] | None = None,
        *,
        pinned: Pinned | None = None,
    ) -> None:
        self._memory = memory
        self._offsets = offsets
        self._moved = moved if moved is not None else {}
        self._pinned = pinned
        self._is_moved = False
        """Whether the unit of the last `get` is; only the link's thread asks."""

    def ask(self, unit: int) -> bool:
        return True

    def get(self, unit: int) -> tuple[Memory, int]:
        own = self._moved.get(unit)
        self._is_moved = own is not None
        return (self._memory, self._offsets[unit]) if own is None else (own, 0)

    def cut(self, offset: int, nbytes: int) -> Iterator[tuple[int, int]]:
        return _cut(None if self._is_moved else self._pinned, offset, nbytes)

    def give_back(self, event: Event | None) -> None:
        pass

    def close(self) -> None:
        if self._pinned is not None:
            self._pinned.close()


class StagedSource:
    """Units that are read from disk into a ring buffer in host memory.

    Reads run ahead as far as the ring has room. Any thread may call `ask`. Only the
    thread of the link calls the other methods, and only it waits for the device before
    a part of the ring is used again.
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
            except Exception as error:  # raised by `get`
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
