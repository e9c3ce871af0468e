"""The `aiofiles` reader: ordinary reads through the page cache, on any system."""

import asyncio
import itertools
import threading
from collections.abc import Iterable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiofiles

from ..checkpoint.header import FileStamp
from ..errors import CheckpointError
from ..fallbacks import Fallbacks
from .daemon_pool import DaemonPool
from .files import Files, OpenFile
from .queued_reader import LAST, NORMAL, URGENT, QueuedReader, RequestPart

_Part = RequestPart[memoryview]
_Queue = asyncio.PriorityQueue[tuple[int, int, _Part | None]]


class AiofilesReader(QueuedReader[memoryview]):
    """Reads in `num_tasks` tasks of an event loop, in chunks of at most `chunk_bytes`.

    The event loop has a thread of its own, and each task its own file descriptors. This
    reader is for systems and file systems without O_DIRECT. Bytes go through the page
    cache, so the CPU copies them once.
    """

    name = "aiofiles"

    def __init__(
        self, stamps: Mapping[Path, FileStamp], *, num_tasks: int, chunk_bytes: int
    ) -> None:
        super().__init__(
            # Opens no file: each task opens its own.
            Files(stamps, direct=False, fallbacks=Fallbacks()),
            chunk_bytes=chunk_bytes,
            num_lanes=num_tasks,
        )
        self._stamps = stamps
        self._number = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._queue: _Queue = asyncio.PriorityQueue()
        self._pool = DaemonPool(num_tasks, "penstock-read-file")
        self._thread = threading.Thread(
            target=self._run, name="penstock-read-loop", daemon=True
        )
        self._thread.start()

    def __repr__(self) -> str:
        return (
            f"<AiofilesReader: {self._num_lanes} tasks, {self._count.num_bytes} bytes>"
        )

    def _put(self, parts: Iterable[_Part], urgent: bool) -> None:
        for part in parts:
            self._enqueue(URGENT if urgent else NORMAL, part)

    def _finish(self) -> None:
        for _ in range(self._num_lanes):
            self._enqueue(LAST, None)
        self._thread.join()
        self._loop.close()

    def _enqueue(self, priority: int, part: _Part | None) -> None:
        item = (priority, next(self._number), part)
        self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    def _run(self) -> None:
        with self._pool:
            self._loop.run_until_complete(self._work_all())

    async def _work_all(self) -> None:
        async with AsyncExitStack() as stack:
            files = _OpenFiles(self._stamps, self._num_lanes, self._pool, stack)
            await asyncio.gather(*(self._work(files) for _ in range(self._num_lanes)))

    async def _work(self, files: "_OpenFiles") -> None:
        while (part := (await self._queue.get())[2]) is not None:
            try:
                idle = await files.open(part.extent.path)
                handle, file = idle.pop()  # never empty: there is one for each task
                try:
                    await self._read(handle, file, part)
                finally:
                    idle.append((handle, file))
            except BaseException as error:
                part.fail(error)
            else:
                part.handle.done()
            del part  # a mapping is freed only after its last view

    async def _read(self, handle: Any, file: OpenFile, part: _Part) -> None:
        extent = part.extent
        wanted, position = file.wanted(extent), 0
        while position < wanted:
            try:
                await handle.seek(extent.offset + position)
                count = await handle.readinto(part.buffer[position:])
            except InterruptedError:
                continue
            except OSError as error:
                raise file.failed(extent, error) from error
            position = file.advance(extent, position, count)
            self._count.add(reads=1)
        file.check()
        self._count.add(nbytes=wanted)


class _OpenFiles:
    """Opens each file when it is first read, once for each task.

    Each task needs its own descriptor, because a descriptor has one position. All are
    opened at once, so a file that replaces this one later is not seen.
    """

    def __init__(
        self,
        stamps: Mapping[Path, FileStamp],
        num_tasks: int,
        pool: DaemonPool,
        stack: AsyncExitStack,
    ) -> None:
        self._stamps = stamps
        self._num_tasks = num_tasks
        self._pool = pool
        self._stack = stack
        self._lock = asyncio.Lock()
        self._idle: dict[Path, list[tuple[Any, OpenFile]]] = {}

    async def open(self, path: Path) -> list[tuple[Any, OpenFile]]:
        """The idle handles of `path`. Raises CheckpointError if it cannot be opened."""
        async with self._lock:
            if path not in self._idle:
                self._idle[path] = [
                    await self._open(path) for _ in range(self._num_tasks)
                ]
            return self._idle[path]

    async def _open(self, path: Path) -> tuple[Any, OpenFile]:
        try:
            opening = aiofiles.open(path, "rb", buffering=0, executor=self._pool)
            handle = await self._stack.enter_async_context(opening)
        except OSError as error:
            raise CheckpointError(f"cannot open {path}: {error.strerror}") from error
        return handle, OpenFile(path, handle.fileno(), False, self._stamps[path])
