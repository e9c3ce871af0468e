"""The `libaio` reader: the kernel has a deep queue of direct reads.

One thread submits them and waits for their events.
"""

import errno
import os
import queue
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.header import FileStamp
from ..errors import ReadError
from ..extent import Extent
from ..fallbacks import Fallbacks
from ..handle import forget_frames
from .files import Files, OpenFile
from .queued_reader import PartQueue, QueuedReader, RequestPart

_RETRIED = frozenset((errno.EINTR, errno.EAGAIN))
_RETRY_SECONDS = 0.001
_MAX_STALLS = 500


def why_not() -> str | None:
    """What this reader lacks, and how to install it; None if it can be used."""
    try:
        import libaio  # noqa: F401
    except ImportError:
        return "the Python package libaio is not installed (pip install libaio)"
    except OSError:
        return "the system has no libaio.so.1 (apt install libaio1, or libaio1t64)"
    return None


@dataclass(slots=True)
class _Lane:
    """One place in the kernel's queue, and the part that it reads."""

    block: Any
    part: RequestPart[memoryview] | None = None
    file: OpenFile | None = None
    position: int = 0
    """Bytes of the part that have been read."""
    num_stalls: int = 0
    """How often the kernel refused the read although no other read was under way."""


class LibaioReader(QueuedReader[memoryview]):
    """Keeps up to `depth` reads of at most `chunk_bytes` in the kernel's queue.

    One thread submits reads and collects their results. A read costs one system call
    for each of these, and no switch of threads. Only O_DIRECT reads are asynchronous in
    the kernel. If a file system refuses O_DIRECT, its files are read one after the
    other, and `fallbacks` says so.
    """

    name = "libaio"

    def __init__(
        self,
        stamps: Mapping[Path, FileStamp],
        *,
        depth: int,
        chunk_bytes: int,
        direct: bool,
        fallbacks: Fallbacks,
    ) -> None:
        import libaio

        super().__init__(
            Files(stamps, direct=direct, fallbacks=fallbacks),
            chunk_bytes=chunk_bytes,
            num_lanes=1,  # chunks need no balance: the deep queue keeps the drive busy
        )
        self._context = libaio.AIOContext(depth)
        self._depth = depth
        self._parts: PartQueue[memoryview] = PartQueue()
        self._idle = [
            _Lane(libaio.AIOBlock(libaio.AIOBLOCK_MODE_READ)) for _ in range(depth)
        ]
        self._busy: dict[int, _Lane] = {}
        self._stalled: list[_Lane] = []
        self._is_fed = True
        """Whether the queue may deliver more parts."""
        self._thread = threading.Thread(
            target=self._work, name="penstock-read-aio", daemon=True
        )
        self._thread.start()

    def __repr__(self) -> str:
        return (
            f"<LibaioReader: {self._depth} deep, {len(self._files)} files, "
            f"{self._count.num_bytes} bytes>"
        )

    def _put(self, parts: Iterable[RequestPart[memoryview]], urgent: bool) -> None:
        self._parts.put(parts, urgent)

    def _finish(self) -> None:
        self._parts.close(1)
        self._thread.join()

    def _work(self) -> None:
        try:
            with self._context:  # once closed, it no longer writes into buffers
                while self._is_fed or self._busy or self._stalled:
                    self._fill()
                    if self._busy:
                        self._collect()
                    elif self._stalled:
                        time.sleep(_RETRY_SECONDS)
                    self._submit_stalled()
        except BaseException as error:
            self._give_up(error)

    def _fill(self) -> None:
        """Starts parts until no lane is idle or no part is left."""
        while self._is_fed and self._idle:
            try:  # wait only if there is nothing to collect
                has_work = self._busy or self._stalled
                part = self._parts.take(wait=not has_work)
            except queue.Empty:
                break
            if part is None:
                self._is_fed = False
                break
            lane = self._idle.pop()
            lane.part, lane.position, lane.num_stalls = part, 0, 0
            del part  # a mapping is freed only after its last view
            self._begin(lane)

    def _give_up(self, error: BaseException) -> None:
        """Fails all parts: the kernel's queue is broken and would never end them."""
        lanes = [*self._busy.values(), *self._stalled]
        self._busy.clear()
        self._stalled.clear()
        # A mapping is freed only after its last view. The context holds the views of
        # unfinished reads, and the frames of the error hold others.
        del self._context
        forget_frames(error)
        for lane in lanes:
            assert lane.part is not None, "a lane in use has a part"
            self._end(lane, _broken(lane.part.extent, error))
        while self._is_fed and (part := self._parts.take()) is not None:
            part.fail(_broken(part.extent, error))
            del part

    def _begin(self, lane: _Lane) -> None:
        assert lane.part is not None, "a lane begins with a part"
        try:
            lane.file = self._files.open(lane.part.extent.path)
        except BaseException as error:
            self._end(lane, error)
            return
        self._go_on(lane)

    def _go_on(self, lane: _Lane) -> None:
        """Submits the rest of the lane's part, or ends the part if nothing is left."""
        part, file = lane.part, lane.file
        assert part is not None, "a lane that goes on has a part"
        assert file is not None, "and its file is open"
        try:
            wanted = file.wanted(part.extent)
            if lane.position >= wanted:
                file.check()
                self._count.add(nbytes=wanted)
                self._end(lane)
                return
            block = lane.block
            block.target_file = file.descriptor
            block.buffer_list = [part.buffer[lane.position :]]
            block.offset = part.extent.offset + lane.position
            self._submit(lane, file, part.extent)
        except BaseException as error:
            del part  # the error keeps this frame
            self._end(lane, error)

    def _submit(self, lane: _Lane, file: OpenFile, extent: Extent) -> None:
        try:
            num = self._context.submit([lane.block])
        except OSError as error:
            if error.errno not in _RETRIED or lane.num_stalls > _MAX_STALLS:
                raise file.failed(extent, error) from error
            num = 0
        if num:
            self._busy[id(lane.block)] = lane
        else:  # the kernel has no room until another read ends
            self._stalled.append(lane)

    def _collect(self) -> None:
        """Waits until at least one read has ended, and handles all that have."""
        try:
            events = self._context.getEvents(min_nr=1)
        except InterruptedError:
            return
        for block, result, _ in events:
            lane = self._busy.pop(id(block))
            self._count.add(reads=1)
            self._arrived(lane, result)
            # Refill at once: a drive that ended several reads together is idle now.
            self._fill()

    def _submit_stalled(self) -> None:
        stalled, self._stalled = self._stalled, []
        for lane in stalled:
            lane.num_stalls += not self._busy
            self._go_on(lane)

    def _arrived(self, lane: _Lane, result: int) -> None:
        part, file = lane.part, lane.file
        assert part is not None, "a lane in use has a part"
        assert file is not None, "and its file is open"
        try:
            if result >= 0:
                lane.position = file.advance(part.extent, lane.position, result)
            elif -result not in _RETRIED:
                raise file.failed(part.extent, OSError(-result, os.strerror(-result)))
        except BaseException as error:
            del part  # the error keeps this frame
            self._end(lane, error)
        else:
            self._go_on(lane)

    def _end(self, lane: _Lane, error: BaseException | None = None) -> None:
        part = lane.part
        assert part is not None, "a lane ends once"
        lane.block.buffer_list = ()  # a mapping is freed only after its last view
        lane.part = lane.file = None
        self._idle.append(lane)
        if error is None:
            part.handle.done()
        else:
            part.fail(error)


def _broken(extent: Extent, error: BaseException) -> ReadError:
    broken = ReadError(
        f"reading {extent.nbytes} bytes at {extent.offset} of {extent.path} failed: "
        f"the kernel's queue of reads is broken ({error}); load the model again"
    )
    broken.__cause__ = error
    return broken
