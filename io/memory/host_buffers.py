"""Buffers in host memory, lent out and used again."""

from collections.abc import Callable
from contextlib import ExitStack, suppress

from ..closing import Closing
from ..event import Event
from ..extent import align_up
from .arena import Arena

_LEAST_BYTES = 64 << 10


class HostBuffers(Closing):
    """Lends out buffers of at least the bytes asked for, each an arena of its own.

    One that is given back is lent again; where none is large enough, a larger one takes
    the place of one that is free, so there are never more than were lent at one time.
    `pin(buffer)` locks a new one in place, for a GPU, until what it returns is closed.
    For one thread.
    """

    def __init__(self, pin: Callable[[Arena], Closing | None]) -> None:
        self._pin = pin
        self._free: list[tuple[Arena, Event]] = []
        self._open: dict[int, tuple[Arena, Closing | None]] = {}
        self.num_allocated = 0
        """Since this was made: in a steady state it stands still."""

    def __repr__(self) -> str:
        return (
            f"<HostBuffers: {len(self._open) - len(self._free)}/{len(self._open)} "
            f"lent, {self.nbytes} bytes>"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, lent or not."""
        return sum(buffer.nbytes for buffer, _ in self._open.values())

    def take(self, nbytes: int) -> Arena:
        """The smallest free buffer that holds `nbytes`. Work that writes there must
        come after the last work of who gave it back. Raises DoesNotFitError when the
        system refuses the memory of a new one."""
        fitting = [found for found in self._free if found[0].nbytes >= nbytes]
        if fitting:
            best = min(fitting, key=lambda found: found[0].nbytes)
            self._free = [found for found in self._free if found is not best]
            return best[0]
        if self._free:  # caches grow: what is too small now is so for ever
            buffer, used = self._free.pop()
            used.wait()
            self._drop(buffer)
        buffer = Arena(size_class(nbytes))
        self._open[id(buffer)] = buffer, None
        self._open[id(buffer)] = buffer, self._pin(buffer)
        self.num_allocated += 1
        return buffer

    def give_back(self, buffer: Arena, used: Event) -> None:
        """`buffer` may be lent again; a device is done with it when `used` has
        passed."""
        is_free = any(free is buffer for free, _ in self._free)
        if id(buffer) in self._open and not is_free:
            self._free.append((buffer, used))

    def close(self) -> None:
        """Frees all of them, lent or not: after all work with them."""
        self._free.clear()
        with ExitStack() as left:
            for buffer, _ in list(self._open.values()):
                left.callback(self._drop, buffer)

    def _drop(self, buffer: Arena) -> None:
        with suppress(KeyError):
            _, pinned = self._open.pop(id(buffer))
            if pinned is not None:
                pinned.close()
            buffer.close()


def size_class(nbytes: int) -> int:
    """`nbytes` rounded up, by a quarter at most: what grows slowly fits for long."""
    step = max(1 << (nbytes.bit_length() - 3), _LEAST_BYTES)
    return align_up(nbytes, step)
