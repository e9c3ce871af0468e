"""Buffers in host memory that are lent and used again."""

from collections.abc import Callable
from contextlib import ExitStack, suppress

from ..closing import Closing
from ..event import Event
from ..extent import align_up
from .arena import Arena

_LEAST_BYTES = 64 << 10


class HostBuffers(Closing):
    """Lends buffers, each an arena of at least the requested size.

    A buffer that is given back is lent again. If no free buffer is large enough, a new
    one replaces a free one. So there are never more buffers than were lent at one time.
    `pin(buffer)` pins a new buffer until its result is closed. For one thread only.
    """

    def __init__(self, pin: Callable[[Arena], Closing | None]) -> None:
        self._pin = pin
        self._free: list[tuple[Arena, Event]] = []
        self._open: dict[int, tuple[Arena, Closing | None]] = {}
        self.num_allocated = 0
        """Buffers allocated since the start. In a steady state it does not grow."""

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
        """The smallest free buffer of at least `nbytes`, or a new one.

        Work that writes to it must be ordered after all work of its previous user.
        Raises DoesNotFitError if the system refuses the memory of a new buffer.
        """
        fitting = [free for free in self._free if free[0].nbytes >= nbytes]
        if fitting:
            best = min(fitting, key=lambda free: free[0].nbytes)
            self._free = [free for free in self._free if free is not best]
            return best[0]
        if self._free:  # caches grow, so it would stay too small
            buffer, used = self._free.pop()
            used.wait()
            self._drop(buffer)
        buffer = Arena(size_class(nbytes))
        self._open[id(buffer)] = buffer, None
        self._open[id(buffer)] = buffer, self._pin(buffer)
        self.num_allocated += 1
        return buffer

    def give_back(self, buffer: Arena, used: Event) -> None:
        """Returns `buffer` to the pool; a device may use it until `used` has passed."""
        is_free = any(free is buffer for free, _ in self._free)
        if id(buffer) in self._open and not is_free:
            self._free.append((buffer, used))

    def close(self) -> None:
        """Frees all buffers, lent or not. Call it after all work with them."""
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
    """`nbytes` rounded up: by a quarter at most, or to 64 KiB.

    A buffer of this size stays large enough for long if the need grows slowly.
    """
    step = max(1 << (nbytes.bit_length() - 3), _LEAST_BYTES)
    return align_up(nbytes, step)
