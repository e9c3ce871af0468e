"""Stores rows in a file. A tail of less than a page stays in memory."""

import torch

from ..devices.device import CpuStream, Device
from ..errors import ClosedError
from ..extent import align_down, align_up
from ..handle import Handle
from ..readers.files import ALIGNMENT
from .file import KvFile, pages
from .host_bounce import HostBounce
from .pages import PAGE_BYTES, plan_append, spans
from .storage import GONE, Arrival, KvStorage

_move = CpuStream().copy


class FileStorage(KvStorage):
    """Writes appended rows in the background, in order.

    A fetch sees all rows that were appended before it. A failed write is raised by the
    next `append` or `fetch`, or by the arrival of a later fetch.
    """

    def __init__(self, file: KvFile, device: Device, bounce: HostBounce) -> None:
        self._file = file
        self._device = device
        self._bounce = bounce
        self._offsets: list[int] = []
        self._sizes: list[int] = []
        self._written: Handle = Handle(0)
        self._read: Handle = Handle(0)
        self._error: BaseException | None = None
        # Only for the writer's thread, and for those who have waited for it.
        self._done = 0
        with torch.inference_mode(False):
            self._tail = torch.empty(PAGE_BYTES, dtype=torch.uint8, device="cpu")
        self._is_closed = False

    def grow(self, nbytes: int) -> None:
        nbytes = pages(nbytes)
        self._offsets.append(self._file.take(nbytes))
        self._sizes.append(nbytes)
        self.capacity += nbytes

    def round(self, nbytes: int) -> int:
        return pages(nbytes)

    def lead(self, start: int) -> int:
        return start % ALIGNMENT

    def room(self, nbytes: int, more: int) -> int:
        return max(align_up(nbytes, ALIGNMENT), nbytes + more)

    def append(self, rows: torch.Tensor) -> None:
        """Queues a write of `rows` (uint8 [bytes], on the device)."""
        self._check()
        outgoing = self._bounce.out(rows)

        def act() -> None:
            try:
                self._append(outgoing.wait())
            finally:
                outgoing.close()

        self._written = self._file.writer.give(act, rows.nbytes)
        self.nbytes += rows.nbytes

    def fetch(self, start: int, end: int, target: torch.Tensor) -> Arrival:
        """Queues a read into `target` (uint8 [bytes], on the device)."""
        self._check()
        arrival = Arrival(self._device)
        low = align_down(start, ALIGNMENT)
        incoming = self._bounce.back(target[: align_up(end, ALIGNMENT) - low])
        written = self._written

        def act() -> None:
            try:
                written.wait()
                self._fetch(start, end, incoming.buffer)
                incoming.send()
            finally:
                incoming.close()

        arrival.handle = self._read = self._file.reader.give(act)
        return arrival

    def truncate(self, nbytes: int) -> None:
        self._check()
        self._read.wait_quietly()
        self._written.wait()
        flushed = align_down(self._done, PAGE_BYTES)
        low = align_down(nbytes, PAGE_BYTES)
        if low < flushed and low < nbytes:  # this page is no longer whole

            def act() -> None:
                self._read_pages(low, low + PAGE_BYTES, page)
                _move(self._tail, page)

            with torch.inference_mode(False):
                whole = torch.empty(
                    PAGE_BYTES + ALIGNMENT, dtype=torch.uint8, device="cpu"
                )
            start = -whole.data_ptr() % ALIGNMENT
            page = whole[start : start + PAGE_BYTES]
            self._file.reader.give(act).wait()
        self._done = self.nbytes = nbytes

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            for offset, nbytes in zip(self._offsets, self._sizes, strict=True):
                self._file.give_back(offset, nbytes)

    def _check(self) -> None:
        if self._is_closed:
            raise ClosedError(GONE)
        if self._error is not None:
            raise self._error

    # The writer's thread calls these, and the reader's, which waits for the writer.

    def _append(self, rows: torch.Tensor) -> None:
        if self._error is not None or self._is_closed:
            return
        plan = plan_append(self._done, rows.nbytes, PAGE_BYTES)
        held = self._done % PAGE_BYTES
        try:
            if plan.write_end > plan.write_start:
                self._write(plan.write_start, held, rows[: plan.num_written])
                held = 0
        except BaseException as error:
            self._error = error
            raise
        rest = rows[plan.num_written :]
        _move(self._tail[held : held + rest.nbytes], rest)
        self._done += rows.nbytes

    def _write(self, start: int, held: int, rows: torch.Tensor) -> None:
        whole = [self._tail[:held], rows]
        end = start + held + rows.nbytes
        for span in spans(self._sizes, start, end):
            parts, skipped = [], span.position
            wanted = span.nbytes
            for part in whole:
                rest = part[skipped : skipped + wanted]
                skipped = max(skipped - part.nbytes, 0)
                wanted -= rest.nbytes
                if rest.nbytes:
                    parts.append(rest)
            self._file.write(self._offsets[span.segment] + span.offset, parts)

    def _fetch(self, start: int, end: int, target: torch.Tensor) -> None:
        """Reads bytes into `target`, behind its first `lead(start)` bytes."""
        low = align_down(start, ALIGNMENT)
        flushed = align_down(self._done, PAGE_BYTES)
        high = min(align_up(end, ALIGNMENT), flushed)
        if low < high:
            self._read_pages(low, high, target)
        if flushed < end:
            first = max(start, flushed)
            tail = self._tail[first - flushed : end - flushed]
            _move(target[first - low : end - low], tail)

    def _read_pages(self, start: int, end: int, target: torch.Tensor) -> None:
        for span in spans(self._sizes, start, end):
            part = target[span.position : span.position + span.nbytes]
            self._file.read(self._offsets[span.segment] + span.offset, part)
