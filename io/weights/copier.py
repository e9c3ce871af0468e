"""Threads that bring bytes by way of buffers: others are read while one is cast."""

import mmap
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..closing import Closing
from ..errors import ClosedError
from ..extent import Extent, aligned
from ..handle import Handle, forget_way

_UNDER_WAY = 2
"""Pieces of each thread that are read, or cast. A drive that waits for the cast of what
it has brought is idle for a fifth of the time, or more where the cores are busy."""


@dataclass(frozen=True, slots=True)
class CopyTask:
    """Bytes of a file, and what is to be done with them."""

    unit: str
    extent: Extent
    place: Callable[[memoryview], None]
    """Called with the bytes, which are valid until it returns."""
    handle: Handle
    """One part of it is done when `place` has returned, or something failed."""


class BounceCopier(Closing):
    """Takes pieces in order. `submit` (unit, extent, buffer) starts a read of an extent
    that is aligned to `alignment`. Each of `num_threads`, started when first needed,
    has two buffers of `bounce_bytes`; a larger piece gets one of its own."""

    def __init__(
        self,
        submit: Callable[[str, Extent, memoryview], Handle],
        *,
        alignment: int,
        bounce_bytes: int,
        num_threads: int,
    ) -> None:
        self._submit = submit
        self._alignment = alignment
        self._buffer_bytes = bounce_bytes + 2 * alignment
        self._num_threads = num_threads
        self._threads: list[threading.Thread] = []
        self._pieces: deque[CopyTask] = deque()
        self._changed = threading.Condition()
        self._is_closed = False

    def put(self, pieces: Iterable[CopyTask]) -> None:
        """Returns at once. Raises ClosedError when it is closed, RuntimeError where no
        thread can be started; then nothing is under way."""
        found = list(pieces)
        with self._changed:
            if self._is_closed:
                raise ClosedError("this loader is closed; load the model again")
            if found and not self._threads:
                self._start()
            self._pieces.extend(found)
            self._changed.notify_all()

    def close(self) -> None:
        """Does what was put, and ends the threads."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _start(self) -> None:
        for number in range(self._num_threads):
            name = f"penstock-copy_{number}"
            thread = threading.Thread(target=self._work, name=name, daemon=True)
            try:
                thread.start()
            except RuntimeError:  # one does as well, slower
                if not self._threads:
                    raise
                return
            self._threads.append(thread)

    def _next(self, *, wait: bool) -> CopyTask | None:
        """None if there is nothing now, or, after waiting, nothing any more."""
        with self._changed:
            while wait and not (self._pieces or self._is_closed):
                self._changed.wait()
            return self._pieces.popleft() if self._pieces else None

    def _work(self) -> None:
        free: list[memoryview | None] = [None] * _UNDER_WAY
        reads: deque[_Read] = deque()
        while True:
            piece = self._next(wait=not reads)
            if piece is not None:
                reads.append(self._begin(piece, free.pop()))
            elif not reads:
                return
            if piece is None or not free:
                free.append(self._end(reads.popleft()))
            piece = None  # what it places may be somebody's memory

    def _begin(self, piece: CopyTask, buffer: memoryview | None) -> "_Read":
        window = aligned(piece.extent, self._alignment)
        read = _Read(piece, window.offset)
        try:
            if buffer is None or len(buffer) < window.nbytes:
                nbytes = max(window.nbytes, self._buffer_bytes)
                buffer = memoryview(mmap.mmap(-1, nbytes))
            read.buffer = buffer
            if window.nbytes:
                view = buffer[: window.nbytes]
                read.handle = self._submit(piece.unit, window, view)
        except BaseException as error:
            read.error = error
        return read

    def _end(self, read: "_Read") -> memoryview | None:
        """Returns the buffer, if it is of the usual size."""
        error = read.error or _place(read)
        if error is not None:
            forget_way(error)  # this thread's frames have buffers in hand
        read.piece.handle.done(error)
        buffer = read.buffer
        is_usual = buffer is not None and len(buffer) <= self._buffer_bytes
        return buffer if is_usual else None


@dataclass(slots=True)
class _Read:
    """A piece on its way into `buffer`, which begins with the byte at `offset`."""

    piece: CopyTask
    offset: int
    buffer: memoryview | None = None
    handle: Handle | None = None
    error: BaseException | None = None


def _place(read: _Read) -> BaseException | None:
    """Waits for `read` and does what is to be done with it. Returns what failed."""
    try:
        if read.handle is not None:
            read.handle.wait()
        assert read.buffer is not None, "what has none has failed"
        start = read.piece.extent.offset - read.offset
        read.piece.place(read.buffer[start : start + read.piece.extent.nbytes])
    except BaseException as error:  # raised by whoever waits for the unit
        return error
    return None
