"""A reader that takes from a ring what other processes have read."""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from ..checkpoint.header import FileStamp
from ..closing import Closing
from ..errors import ClosedError
from ..extent import Extent
from ..fallbacks import Fallbacks
from ..fork_guard import ForkGuard
from ..handle import Handle, forget_frames
from ..readers.reader import Reader, ReaderStatistics
from .in_step import InStep
from .pieces import PassStarts, Piece, cut, digests
from .ring import Place, RingBrokenError
from .table import Key

LEAST_BYTES = 64 << 10
"""Shorter reads are not shared, if pieces are longer."""
_BEAT_SECONDS = 0.5
_LOOK_FOR_GONE_SECONDS = 0.1
_FEWEST_READS, _MOST_READS = 2, 4


class SharedReader(Closing):
    """Reads with `inner` what no other process of the ring has read yet.

    A thread of its own decides about each piece, in the order in which reads were
    submitted: it copies pieces from and to the ring, and submits reads to `inner`.
    Urgent and short reads go straight to `inner`. `inner` is not closed here, but
    `place` is. `fallbacks` learns when the ring cannot be used any more.
    """

    def __init__(
        self,
        inner: Reader,
        place: Place,
        stamps: Mapping[Path, FileStamp],
        fallbacks: Fallbacks,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = inner.name
        self.alignment = inner.alignment
        self.bytes_shared = 0
        """Bytes that were taken from the ring."""
        self._inner = inner
        self._place = place
        self._files = digests(stamps)
        self._fallbacks = fallbacks
        self._clock = clock
        shape = place.shape
        self._piece_bytes = shape.slot_bytes
        self._least_bytes = min(LEAST_BYTES, shape.slot_bytes)
        most_reads = shape.num_slots // (4 * shape.num_seats)
        most_reads = min(max(most_reads, _FEWEST_READS), _MOST_READS)
        self._in_step = InStep(place.seat, most_reads, clock())
        self._passes = PassStarts()
        self._open: deque[Piece] = deque()
        """Pieces that are neither there nor read, in the order they are needed in."""
        self._num_reads = 0
        self._gone, self._gone_at = 0, float("-inf")
        self._is_sharing = True
        self._changed = threading.Condition()
        self._new: deque[Piece] = deque()
        self._ended: deque[Piece] = deque()
        self._is_closed = False
        self._fork_guard = ForkGuard()
        self._thread = threading.Thread(
            target=self._run, name="penstock-share", daemon=True
        )
        self._thread.start()

    def __repr__(self) -> str:
        return f"<SharedReader: {self.bytes_shared} bytes shared, {self._place!r}>"

    def submit(
        self, extent: Extent, buffer: memoryview, *, urgent: bool = False
    ) -> Handle:
        """Starts to read `extent` into `buffer`; see `Reader.submit`."""
        if urgent or extent.nbytes < self._least_bytes:
            return self._inner.submit(extent, buffer, urgent=urgent)
        assert len(buffer) >= extent.nbytes, "the buffer is shorter than the extent"
        self._fork_guard.check("this reader")
        parts = list(cut(extent, self._piece_bytes))
        handle = Handle(len(parts))
        digest = self._files[extent.path]
        with self._changed:
            if self._is_closed:
                raise ClosedError("this reader is closed; load the model again")
            for part in parts:
                start = part.offset - extent.offset
                view = buffer[start : start + part.nbytes]
                self._new.append(self._piece(part, view, handle, digest))
            self._changed.notify()
        return handle

    def statistics(self) -> ReaderStatistics:
        """What this process has read itself."""
        return self._inner.statistics()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()
        self._place.close()

    def _piece(
        self, part: Extent, view: memoryview, handle: Handle, digest: tuple[int, int]
    ) -> Piece:
        key = Key(digest, part.offset, part.nbytes)
        return Piece(part, view, handle, key, self._passes.begins(key))

    # What follows runs on the thread of this reader.

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                self._end_reads()
                if self._is_sharing:
                    self._share()
            except Exception as error:  # whatever it is, somebody waits for the bytes
                self._is_sharing = False
                self._place.abandon()
                why = error if isinstance(error, RingBrokenError) else repr(error)
                self._fallbacks.announce(
                    f"io.read_once: {why}; this process reads all itself from now on"
                )
            if not self._is_sharing or self._is_closed:
                while self._open:
                    self._read(self._open.popleft())

    def _wait_for_work(self) -> bool:
        """Waits until there may be something to do; False at the end."""
        with self._changed:
            if self._is_closed and not (self._new or self._open or self._num_reads):
                return False
            if not (self._new or self._ended):
                poll = self._in_step.poll_seconds
                self._changed.wait(poll if self._open else _BEAT_SECONDS)
            self._open += self._new
            self._new.clear()
        return True

    def _share(self) -> None:
        """Begins reads, and takes what is in the ring."""
        now = self._clock()
        self._place.beat()
        with self._place.locked() as table:
            read, take, is_waiting = self._in_step.decide(
                table,
                self._open,
                num_reads=self._num_reads,
                gone=self._gone,
                now=now,
            )
        for piece in (*read, *take):
            self._open.remove(piece)
        for piece in read:
            self._read(piece)
        self._take(take)
        self._in_step.spend(
            is_idle=not self._open and not self._num_reads,
            is_waiting=is_waiting and not self._num_reads,
            now=self._clock(),
        )
        if self._open and now - self._gone_at > _LOOK_FOR_GONE_SECONDS:
            self._gone, self._gone_at = self._place.gone(), now

    def _read(self, piece: Piece) -> None:
        piece.started_at = self._clock()
        assert piece.buffer is not None, "it has not ended"
        self._num_reads += 1
        try:
            piece.reading = self._inner.submit(piece.extent, piece.buffer)
        except Exception as error:
            piece.reading = Handle(1)
            piece.reading.done(error)
        piece.reading.when_done(partial(self._has_ended, piece))

    def _has_ended(self, piece: Piece) -> None:
        """Called on the thread that has read the piece."""
        with self._changed:
            self._ended.append(piece)
            self._changed.notify()

    def _end_reads(self) -> None:
        """Hands on what has been read, to the ring first."""
        while True:
            with self._changed:
                if not self._ended:
                    return
                piece = self._ended.popleft()
            self._num_reads -= 1
            error: BaseException | None = None
            try:
                assert piece.reading is not None, "it was read"
                piece.reading.wait()
            except BaseException as failure:
                error = failure
            try:
                if self._is_sharing:
                    self._give(piece, has_failed=error is not None)
            finally:
                self._end(piece, error)

    def _give(self, piece: Piece, *, has_failed: bool) -> None:
        """Puts a piece that was read into the ring, if it has a slot there."""
        assert piece.started_at is not None, "it was read"
        assert piece.buffer is not None, "it has not ended"
        seat, slot, nbytes = self._place.seat, piece.slot, piece.extent.nbytes
        if not has_failed:
            self._in_step.note_read(self._clock() - piece.started_at)
            if slot >= 0:
                self._place.put(slot, piece.buffer[:nbytes])
        with self._place.locked() as table:
            if slot < 0:
                table.count_alone(nbytes)
            elif has_failed:
                table.abandon(slot)
            else:
                table.publish(seat, slot)

    def _take(self, pieces: list[Piece]) -> None:
        """Copies pieces from the ring."""
        if not pieces:
            return
        for piece in pieces:
            assert piece.buffer is not None, "it has not ended"
            self._place.get(piece.slot, piece.buffer)
            self.bytes_shared += piece.extent.nbytes
        try:
            with self._place.locked() as table:
                for piece in pieces:
                    table.taken(self._place.seat, piece.slot)
        finally:
            for piece in pieces:
                self._end(piece)

    def _end(self, piece: Piece, error: BaseException | None = None) -> None:
        """Tells who waits for the piece that it is there, or why not."""
        handle = piece.handle
        piece.buffer = piece.reading = None
        if error is not None:
            forget_frames(error)
        handle.done(error)
