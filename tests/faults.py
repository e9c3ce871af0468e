"""Storage that misbehaves as storage does: late, short, interrupted, out of order, and
broken. Every fault is drawn from a seeded schedule, and what was broken is recorded."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, Self

import aiofiles
import pytest

from penstock.io.checkpoint.header import FileStamp
from penstock.io.extent import Extent
from penstock.io.fallbacks import Fallbacks
from penstock.io.handle import Handle
from penstock.io.readers import libaio_reader as aio
from penstock.io.readers.aiofiles_reader import AiofilesReader
from penstock.io.readers.libaio_reader import LibaioReader
from penstock.io.readers.reader import Reader, ReaderStatistics
from penstock.io.readers.threads import ThreadReader

PAGE = 4096


class Faults:
    """What happens to each read of the system, in order."""

    def __init__(self, seed: int, *, errors: float) -> None:
        self._random = Random(seed)
        self._lock = threading.Lock()
        self._errors = errors
        self.broken: list[int] = []
        """Offsets in the file of the reads that were answered with EIO."""
        self.num_short = 0
        self.num_interrupted = 0

    def draw(self) -> tuple[str, float]:
        """The next read's fate, and a number from 0 to 1 that says how bad."""
        with self._lock:
            chance, amount = self._random.random(), self._random.random()
        if chance < self._errors:
            return "error", amount
        if chance < 0.25:
            return "short", amount
        if chance < 0.35:
            return "interrupted", amount
        if chance < 0.45:
            return "late", amount
        return "well", amount

    def shuffle(self, items: list[Any]) -> None:
        with self._lock:
            self._random.shuffle(items)

    def delay_seconds(self) -> float:
        with self._lock:
            return self._random.random() * 0.002

    def shorten(self, nbytes: int, amount: float) -> int:
        """At least a byte; now and then less than a block, or a part of one."""
        self.num_short += 1
        return max(1, int(nbytes * amount))


def faulty_preadv(faults: Faults) -> Callable[..., int]:
    """`os.preadv` of a device that misbehaves."""
    preadv = os.preadv

    def read(descriptor: int, buffers: list[Any], offset: int) -> int:
        if not isinstance(buffers[0], memoryview):
            return preadv(descriptor, buffers, offset)  # the probe for O_DIRECT
        fate, amount = faults.draw()
        if fate == "error":
            faults.broken.append(offset)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if fate == "interrupted":
            faults.num_interrupted += 1
            raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
        if fate == "late":
            time.sleep(amount * 0.002)
        count = preadv(descriptor, buffers, offset)
        if fate == "short" and count > 1:
            keep = faults.shorten(count, amount)
            buffers[0][keep:count] = b"\xee" * (count - keep)  # it did not come
            return keep
        return count

    return read


def faulty_context(faults: Faults, real: type) -> type:
    """`libaio.AIOContext` of a device that misbehaves."""

    class Context(real):  # type: ignore[misc]
        def submit(self, blocks: list[Any]) -> int:
            fate, _ = faults.draw()
            if fate == "short":
                raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            return int(super().submit(blocks))

        def getEvents(self, min_nr: int) -> list[Any]:
            fate, amount = faults.draw()
            if fate == "interrupted":
                faults.num_interrupted += 1
                raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
            if fate == "late":
                time.sleep(amount * 0.002)
            events = [self._spoil(*event) for event in super().getEvents(min_nr)]
            faults.shuffle(events)
            return events

        def _spoil(self, block: Any, result: int, more: int) -> tuple[Any, int, int]:
            fate, amount = faults.draw()
            if fate == "error":
                faults.broken.append(block.offset)
                return block, -errno.EIO, more
            if fate == "interrupted":
                faults.num_interrupted += 1
                return block, -errno.EINTR, more
            if fate == "short" and result > 1:
                keep = faults.shorten(result, amount)
                view = block.buffer_list[0]
                view[keep:result] = b"\xee" * (result - keep)
                return block, keep, more
            return block, result, more

    return Context


def faulty_open(faults: Faults) -> Callable[..., Any]:
    """`aiofiles.open` on a device that misbehaves."""
    real = aiofiles.open

    class File:
        def __init__(self, file: Any) -> None:
            self._file = file
            self._offset = 0

        def fileno(self) -> int:
            return int(self._file.fileno())

        async def seek(self, offset: int) -> None:
            self._offset = offset
            await self._file.seek(offset)

        async def readinto(self, buffer: memoryview) -> int:
            fate, amount = faults.draw()
            if fate == "error":
                faults.broken.append(self._offset)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if fate == "interrupted":
                faults.num_interrupted += 1
                raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
            count = int(await self._file.readinto(buffer))
            if fate == "short" and count > 1:
                keep = faults.shorten(count, amount)
                buffer[keep:count] = b"\xee" * (count - keep)
                return keep
            return count

    class Opening:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._opening = real(*args, **kwargs)

        async def __aenter__(self) -> File:
            return File(await self._opening.__aenter__())

        async def __aexit__(self, *args: Any) -> None:
            await self._opening.__aexit__(*args)

    return Opening


class LateReader:
    """Passes reads on after a while, each of its own, so in another order."""

    def __init__(self, inner: Reader, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults
        self.name = inner.name
        self.alignment = inner.alignment

    def submit(
        self, extent: Extent, buffer: memoryview, *, urgent: bool = False
    ) -> Handle:
        if urgent:  # somebody waits, on this very thread perhaps
            return self._inner.submit(extent, buffer, urgent=True)
        handle = Handle(1)

        def pass_on() -> None:
            try:
                self._inner.submit(extent, buffer).wait()
            except BaseException as error:
                handle.done(error)
            else:
                handle.done()

        threading.Timer(self._faults.delay_seconds(), pass_on).start()
        return handle

    def statistics(self) -> ReaderStatistics:
        return self._inner.statistics()

    def close(self) -> None:
        self._inner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


READERS = ("threads", "aiofiles", *(["libaio"] if aio.why_not() is None else []))


@contextmanager
def faulty_reader(
    name: str, stamps: Mapping[Path, FileStamp], faults: Faults
) -> Iterator[Reader]:
    """The reader `name` on a system that behaves as `faults` say."""
    reader: Reader
    with pytest.MonkeyPatch.context() as patch:
        if name == "threads":
            patch.setattr(os, "preadv", faulty_preadv(faults))
            reader = ThreadReader(
                stamps,
                num_threads=2,
                chunk_bytes=2 * PAGE,
                direct=True,
                fallbacks=Fallbacks(),
            )
        elif name == "aiofiles":
            patch.setattr(aiofiles, "open", faulty_open(faults))
            reader = AiofilesReader(stamps, num_tasks=2, chunk_bytes=2 * PAGE)
        else:
            import libaio

            context = faulty_context(faults, libaio.AIOContext)
            patch.setattr(libaio, "AIOContext", context)
            reader = LibaioReader(
                stamps,
                depth=3,
                chunk_bytes=2 * PAGE,
                direct=True,
                fallbacks=Fallbacks(),
            )
        with reader:
            yield LateReader(reader, faults)
