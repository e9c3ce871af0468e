"""A ring of pieces in memory that several processes share, and its lock.

The memory is an anonymous file (memfd_create), so nothing is left of it when the last
process has ended, however that ended. Its first pages hold the table, the rest the
slots. The table is changed under a lock of the file's byte 0. Byte 1 + i is locked for
as long as the process with seat i lives: the kernel releases both when it dies, also by
SIGKILL. Slots are filled and read without a lock: the table says whose they are.

If a process dies while it changes the table, the table may be half written: nobody uses
the ring any more. The same holds for a process that waits too long for the lock.

The locks are those of an open file (F_OFD_SETLK, fcntl(2)). So each process opens the
file anew, and places in one process exclude each other, too.
"""

import contextlib
import fcntl
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import numpy.typing as npt

from ..closing import Closing
from ..errors import MachineError
from ..extent import align_down, align_up
from .table import HEAD, MOST_SEATS, SLOT, Table

_PAGE = mmap.PAGESIZE
_LOCK_SECONDS = 5.0
_RETRY_SECONDS = 0.0002
_STALE_SECONDS = 5.0
_LEAST_SLOTS = 16
_SLOTS_OF_EACH = 8


class RingBrokenError(MachineError):
    """The ring cannot be used any more."""


@dataclass(frozen=True, slots=True)
class RingShape:
    """How the memory of a ring is divided."""

    num_seats: int
    num_slots: int
    slot_bytes: int

    @classmethod
    def within(
        cls, nbytes: int, *, num_seats: int, most_piece_bytes: int
    ) -> "RingShape | None":
        """The ring of at most `nbytes` for so many processes, with pieces of at most
        `most_piece_bytes`. None if it would be too small."""
        least = max(_LEAST_SLOTS, _SLOTS_OF_EACH * num_seats)
        slot_bytes = align_down(min(most_piece_bytes, nbytes // least), _PAGE)
        if not slot_bytes or num_seats > MOST_SEATS:
            return None
        return cls(num_seats, nbytes // slot_bytes, slot_bytes)

    @property
    def head_bytes(self) -> int:
        beats = 8 * self.num_seats
        return align_up(HEAD.itemsize + beats + self.num_slots * SLOT.itemsize, _PAGE)

    @property
    def nbytes(self) -> int:
        return self.head_bytes + self.num_slots * self.slot_bytes


class Seat:
    """The right of one process to use a ring. It can be given to a process that
    multiprocessing starts, and is used there once."""

    def __init__(self, descriptor: int, shape: RingShape, number: int) -> None:
        self.descriptor = descriptor
        self.shape = shape
        self.number = number

    def __repr__(self) -> str:
        return f"<Seat {self.number} of {self.shape.num_seats}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (DupFd(self.descriptor), self.shape, self.number)


def _received(descriptor: Any, shape: RingShape, number: int) -> Seat:
    return Seat(descriptor.detach(), shape, number)


class SharedRing(Closing):
    """Makes the memory of a ring. Raises MachineError if the system has none."""

    def __init__(self, shape: RingShape) -> None:
        self.shape = shape
        self._descriptor: int | None = None
        try:
            self._descriptor = os.memfd_create("penstock-ring")
            os.ftruncate(self._descriptor, shape.nbytes)
            # Now: a process that first writes to a page without room would be killed.
            os.posix_fallocate(self._descriptor, 0, shape.nbytes)
            _set_lock(self._descriptor, fcntl.F_WRLCK, 0)  # does it know such locks?
            _set_lock(self._descriptor, fcntl.F_UNLCK, 0)
            os.close(_opened_anew(self._descriptor))
        except (OSError, AttributeError) as error:
            self.close()
            raise MachineError(
                f"{shape.nbytes:,} bytes of memory cannot be shared ({error})"
            ) from error

    def __repr__(self) -> str:
        return f"<SharedRing: {self.shape}>"

    def seat(self, number: int) -> Seat:
        assert self._descriptor is not None, "the ring is open"
        return Seat(self._descriptor, self.shape, number)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class Place(Closing):
    """The ring as the process of `seat` uses it. One thread at a time may use it."""

    def __init__(
        self, seat: Seat, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.seat, self.shape = seat.number, seat.shape
        self._descriptor: int | None = _opened_anew(seat.descriptor)
        self._clock = clock
        self._map = mmap.mmap(self._descriptor, self.shape.nbytes)
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        start = HEAD.itemsize
        beats = 8 * self.shape.num_seats
        self._head: npt.NDArray[Any] = self._bytes[:start].view(HEAD).reshape(())
        self._beats = self._bytes[start : start + beats].view(np.float64)
        start += beats
        slots = self._bytes[start : start + self.shape.num_slots * SLOT.itemsize]
        self._table = Table(self._head, slots.view(SLOT), self.shape.num_seats)
        try:
            self._lock(1 + self.seat)
            self.beat()
            with self.locked() as table:
                table.attach(self.seat)
        except BaseException:
            self._free()
            raise

    def __repr__(self) -> str:
        return f"<Place {self.seat} of {self.shape.num_seats}>"

    @contextlib.contextmanager
    def locked(self) -> Iterator[Table]:
        """The table, which nobody else uses meanwhile. Raises RingBrokenError."""
        self._lock(0)
        try:
            if self._head["is_changing"]:
                raise RingBrokenError(
                    "a process died while it changed what all of them share"
                )
            self._head["is_changing"] = 1
            yield self._table
            self._head["is_changing"] = 0
        finally:
            self._unlock(0)

    def beat(self) -> None:
        """Shows the others that this process runs. Needs no lock."""
        self._beats[self.seat] = self._clock()

    def gone(self) -> int:
        """Finds processes that others need not wait for. Those that died are buried;
        returned are the seats of those that have not run for a while."""
        stale = 0
        with self.locked() as table:
            attached = table.attached & ~(1 << self.seat)
            for seat in range(self.shape.num_seats):
                if not attached >> seat & 1:
                    continue
                if self._try_lock(1 + seat):
                    self._unlock(1 + seat)
                    table.bury(1 << seat)
                elif self._clock() - float(self._beats[seat]) > _STALE_SECONDS:
                    stale |= 1 << seat
        return stale

    def put(self, slot: int, piece: memoryview) -> None:
        """Copies a piece into a slot that this process has claimed."""
        np.copyto(self._slot(slot, len(piece)), np.frombuffer(piece, np.uint8))

    def get(self, slot: int, into: memoryview) -> None:
        """Copies the piece of a slot that this process has pinned."""
        np.copyto(np.frombuffer(into, np.uint8), self._slot(slot, len(into)))

    def close(self) -> None:
        """Leaves the ring. Others wait for this process no more."""
        if self._descriptor is None:
            return
        with contextlib.suppress(RingBrokenError):
            self._leave()
        self.abandon()

    def abandon(self) -> None:
        """Leaves the ring without a word. Others see that, as if the process had died:
        so it must not be copying to or from a slot."""
        if self._descriptor is not None:
            self._free()

    def _leave(self) -> None:
        with self.locked() as table:
            table.bury(1 << self.seat)

    def _slot(self, slot: int, nbytes: int) -> npt.NDArray[np.uint8]:
        assert nbytes <= self.shape.slot_bytes, "a piece fits into a slot"
        start = self.shape.head_bytes + slot * self.shape.slot_bytes
        return self._bytes[start : start + nbytes]

    def _free(self) -> None:
        assert self._descriptor is not None, "it is freed once"
        os.close(self._descriptor)  # releases the locks
        self._descriptor = None
        # It is unmapped when the last view is gone; an error's frames may have some.
        del self._table, self._head, self._beats, self._bytes, self._map

    def _lock(self, byte: int) -> None:
        started = self._clock()
        while not self._try_lock(byte):
            if self._clock() - started > _LOCK_SECONDS:
                raise RingBrokenError(
                    f"another process holds its lock for more than {_LOCK_SECONDS:.0f} "
                    "seconds"
                )
            time.sleep(_RETRY_SECONDS)

    def _try_lock(self, byte: int) -> bool:
        assert self._descriptor is not None, "the place is open"
        try:
            _set_lock(self._descriptor, fcntl.F_WRLCK, byte)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def _unlock(self, byte: int) -> None:
        assert self._descriptor is not None, "the place is open"
        _set_lock(self._descriptor, fcntl.F_UNLCK, byte)


def _opened_anew(descriptor: int) -> int:
    return os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)


def _set_lock(descriptor: int, kind: int, byte: int) -> None:
    """Sets or releases the lock of one byte, at once. Raises OSError."""
    wish = struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, 1, 0)  # struct flock
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, wish)
