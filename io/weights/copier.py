"""Threads that read into bounce buffers, and cast one buffer while the next is read."""

import mmap
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ..closing import Closing
from ..errors import ClosedError
from ..extent import Extent, aligned
from ..handle import Handle, forget_traceback

_UNDER_WAY = 2
"""Tasks that each thread has under way: one is cast while the other is read. With one
task only, the drive waits for each cast and is idle for a fifth of the time or more."""


@dataclass(frozen=True, slots=True)
class CopyTask:
    """Byte ranges of files (none for a move within a slot), and the function that puts
    their bytes in place."""

    unit: str
    extents: Sequence[Extent]
    place: Callable[[Sequence[memoryview]], None]
    """Called with the bytes of each extent; the views are valid until it returns."""
    handle: Handle
    """Counts one part down when `place` has returned, or when the task has failed."""


class BounceCopier(Closing):
    """Runs copy tasks in the order in which they were put.

    `submit(unit, extent, buffer)` starts a read of an extent that is aligned to
    `alignment` bytes. The `num_threads` threads start with the first task. Each has two
    buffers of about `bounce_bytes`. A larger task gets a buffer of its own, and nothing
    else is under way on its thread meanwhile.
    """

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
        self._tasks: deque[CopyTask] = deque()
        self._changed = threading.Condition()
        self._is_closed = False

    def put(self, tasks: Iterable[CopyTask]) -> None:
        """Queues `tasks` and returns at once.

        Raises ClosedError after `close`, and RuntimeError when no thread can be
        started. Nothing is queued then.
        """
        added = list(tasks)
        with self._changed:
            if self._is_closed:
                raise ClosedError("this loader is closed; load the model again")
            if added and not self._threads:
                self._start()
            self._tasks.extend(added)
            self._changed.notify_all()

    def close(self) -> None:
        """Finishes the queued tasks and ends the threads."""
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
            except RuntimeError:  # one thread is enough, only slower
                if not self._threads:
                    raise
                return
            self._threads.append(thread)

    def _next(self, *, wait: bool) -> CopyTask | None:
        """The oldest queued task.

        None when the queue is empty; with `wait`, only when it is also closed.
        """
        with self._changed:
            while wait and not (self._tasks or self._is_closed):
                self._changed.wait()
            return self._tasks.popleft() if self._tasks else None

    def _work(self) -> None:
        free: list[memoryview | None] = [None] * _UNDER_WAY
        reads: deque[_Read] = deque()
        while True:
            task = self._next(wait=not reads)
            is_large = task is not None and self._is_large(task)
            while reads and is_large:
                free.append(self._end(reads.popleft()))
            if task is not None:
                reads.append(self._begin(task, free.pop()))
            elif not reads:
                return
            if task is None or is_large or not free:
                free.append(self._end(reads.popleft()))
            task = None  # `place` may hold memory that its owner wants to free

    def _is_large(self, task: CopyTask) -> bool:
        windows = (aligned(extent, self._alignment) for extent in task.extents)
        return sum(window.nbytes for window in windows) > self._buffer_bytes

    def _begin(self, task: CopyTask, buffer: memoryview | None) -> "_Read":
        windows = [aligned(extent, self._alignment) for extent in task.extents]
        total = sum(window.nbytes for window in windows)
        read = _Read(task)
        try:
            if buffer is None or len(buffer) < total:
                buffer = memoryview(mmap.mmap(-1, max(total, self._buffer_bytes)))
            read.buffer = buffer
            position = 0
            for extent, window in zip(task.extents, windows, strict=True):
                start = position + extent.offset - window.offset
                read.views.append(buffer[start : start + extent.nbytes])
                view = buffer[position : position + window.nbytes]
                if window.nbytes:
                    read.handles.append(self._submit(task.unit, window, view))
                position += window.nbytes
        except BaseException as error:
            read.error = error
        return read

    def _end(self, read: "_Read") -> memoryview | None:
        """Finishes `read`. Returns its buffer if it has the usual size, else None."""
        error = _place(read)
        read.views.clear()
        if error is not None:
            forget_traceback(error)  # this thread's running frames hold buffers
        read.task.handle.done(error)
        buffer = read.buffer
        is_usual = buffer is not None and len(buffer) <= self._buffer_bytes
        return buffer if is_usual else None


@dataclass(slots=True)
class _Read:
    """A task whose bytes are read into `buffer`."""

    task: CopyTask
    buffer: memoryview | None = None
    views: list[memoryview] = field(default_factory=list)
    """The bytes of each extent of the task."""
    handles: list[Handle] = field(default_factory=list)
    error: BaseException | None = None


def _place(read: _Read) -> BaseException | None:
    """Waits for `read`, then calls `place`. Returns the error if either fails."""
    for handle in read.handles:
        handle.wait_quietly()  # nobody may write into the buffer after this
    if read.error is not None:
        return read.error
    try:
        for handle in read.handles:
            handle.wait()
        read.task.place(tuple(read.views))
    except BaseException as error:  # raised again where the unit is waited for
        return error
    return None
