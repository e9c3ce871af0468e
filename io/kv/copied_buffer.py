"""A layer buffer whose rows are stored in one place and staged in another."""

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from ..errors import ClosedError
from .codec import Codec
from .count import KvCount
from .layer_buffer import KvLayerBuffer, Lease, Pair
from .shape import KvShape
from .staging import StagedRows, Staging
from .storage import GONE, KvStorage

_GROWTH = 4
"""A full storage grows by at least one part in this number of its capacity."""

_ROOM = 7
"""Extra tokens that a staging buffer has room for, in case it stays staged."""


class CopiedBuffer(KvLayerBuffer):
    """Writes each token to `storage` once, and fetches tokens from there for each step.

    No fetch is needed while the tokens are still staged. When the storage is full and
    at least half of it is forgotten, the rest moves to its start.
    """

    _storage: KvStorage | None = None
    _staged: StagedRows | None = None

    def __init__(
        self,
        shape: KvShape,
        make_codec: Callable[[KvShape], Codec],
        storage: KvStorage,
        staging: Staging,
        lease: Lease,
        count: KvCount,
    ) -> None:
        self.shape = shape
        self._make_codec = make_codec
        self._codec = make_codec(shape)
        self._staging = staging
        self._lease = lease
        self._count = count
        self._base = 0
        """The number of the first token in the storage."""
        self._last_num = 1
        self._storage = storage

    def __repr__(self) -> str:
        return f"<CopiedBuffer: {self.length} tokens, {self._lease.tier}>"

    @property
    def device_bytes(self) -> int:
        if self._storage is None or self._lease.tier != "device":
            return 0
        return self._storage.capacity

    def append(self, keys: torch.Tensor, values: torch.Tensor, start: int) -> Pair:
        """Writes [batch, heads, new tokens, dim] to the storage; stages older tokens.

        See `KvLayerBuffer.append`. Raises the errors of the storage.
        """
        num, row = keys.shape[2], self._codec.row_bytes
        rows = self._codec.encode(keys, values)
        seen = rows
        if start < self.length:
            self._last_num = num
            staged = self._stage(start, num)
            low = staged.lead + (start - staged.first) * row
            end = staged.lead + (self.length - staged.first) * row
            self._staging.put(staged, end, rows)
            seen = staged.buffer[low : end + rows.nbytes]
        self._write(rows)
        if start >= self.length:
            self._unstage()  # the staged rows lack the new ones
        self._count.append(self._lease.tier, num * self.shape.batch, rows.nbytes)
        self.length += num
        return self._codec.decode(seen)

    def view(self, start: int) -> Pair:
        """Stages all tokens from number `start` on; see `KvLayerBuffer.view`."""
        self._open_storage()
        if start == self.length:
            nothing = torch.empty(0, dtype=torch.uint8, device="cpu")
            return self._codec.decode(nothing)
        low, end, staged = self._rows(start)
        return self._codec.decode(staged.buffer[low:end])

    def prefetch(self) -> bool:
        """Starts a fetch of all kept tokens; see `KvLayerBuffer.prefetch`."""
        staged = self._staged
        is_there = staged is not None and not staged.is_dropped
        if self._storage is None or is_there or self.first >= self.length:
            return True
        self._staged = self._fetch(self.first, self._last_num, ahead=True)
        return self._staged is not None

    def skip(self, num: int) -> None:
        super().skip(num)
        self._base = num

    def forget(self, before: int) -> None:
        self.first = before

    def truncate(self, length: int) -> None:
        """Removes all tokens from number `length` on, also from the storage."""
        storage = self._open_storage()
        self._unstage()
        storage.truncate((length - self._base) * self._codec.row_bytes)
        self.length = length

    def select(self, rows: torch.Tensor) -> None:
        """Writes the selected sequences anew; `rows` is int64 [new batch]."""
        storage = self._open_storage()
        kept = self.view(self.first)
        rows = rows.to(kept[0].device)
        keys, values = (part.index_select(0, rows) for part in kept)
        del kept
        self._unstage()
        self.shape = replace(self.shape, batch=rows.shape[0])
        self._codec = self._make_codec(self.shape)
        storage.truncate(0)
        self._base = self.first
        encoded = self._codec.encode(keys, values)
        self._write(encoded)
        self._count.moved += encoded.nbytes

    def close(self) -> None:
        storage, self._storage = self._storage, None
        if storage is not None:
            self._unstage()
            storage.close()
            self._lease.give_back()

    def _open_storage(self) -> KvStorage:
        if self._storage is None:
            raise ClosedError(GONE)
        return self._storage

    def _write(self, rows: torch.Tensor) -> None:
        storage = self._open_storage()
        missing = storage.nbytes + rows.nbytes - storage.capacity
        if missing > 0 and 2 * (self.length - self.first) <= self.length - self._base:
            self._compact(storage)
            missing = storage.nbytes + rows.nbytes - storage.capacity
        if missing > 0:
            more = storage.round(max(missing, storage.capacity // _GROWTH))
            self._lease.resize(storage.capacity + more)
            storage.grow(more)
        storage.append(rows)

    def _compact(self, storage: KvStorage) -> None:
        """Moves the kept rows to the start, over at least as many forgotten bytes."""
        encoded = torch.empty(0, dtype=torch.uint8, device="cpu")
        if self.first < self.length:
            low, end, staged = self._rows(self.first)
            encoded = staged.buffer[low:end].clone()
        storage.truncate(0)
        self._base = self.first
        if encoded.nbytes:
            storage.append(encoded)
            self._count.moved += encoded.nbytes

    def _rows(self, start: int) -> tuple[int, int, StagedRows]:
        """Stages the tokens from `start` on.

        Returns their first and last offset (bytes) in the buffer, and the staged rows.
        """
        row = self._codec.row_bytes
        staged = self._stage(start, 0)
        low = staged.lead + (start - staged.first) * row
        return low, staged.lead + (self.length - staged.first) * row, staged

    def _stage(self, start: int, num: int) -> StagedRows:
        """Stages the tokens from `start` on, with room for `num` more behind them."""
        staged, row = self._staged, self._codec.row_bytes
        if staged is not None and not staged.is_dropped:
            end = staged.lead + (self.length + num - staged.first) * row
            if staged.first > start or end > staged.buffer.nbytes:
                self._unstage()
        if self._staged is None or self._staged.is_dropped:
            self._staged = self._fetch(start, num, ahead=False)
        assert self._staged is not None, (
            "a fetch that is not ahead always gets a buffer"
        )
        began = time.perf_counter()
        self._staging.use(self._staged)
        self._count.wait_seconds += time.perf_counter() - began
        return self._staged

    def _fetch(self, start: int, num: int, *, ahead: bool) -> StagedRows | None:
        storage, row = self._open_storage(), self._codec.row_bytes
        low = (start - self._base) * row
        end = (self.length - self._base) * row
        lead = storage.lead(low)
        nbytes = storage.room(lead + end - low, (num + _ROOM) * row)
        staged = self._staging.lend(nbytes, lead, start, ahead=ahead)
        if staged is not None:
            try:
                staged.ready = storage.fetch(low, end, staged.buffer)
            except BaseException:
                self._staging.drop(staged)
                raise
            self._count.read[self._lease.tier] += end - low
        return staged

    def _unstage(self) -> None:
        if self._staged is not None:
            self._staging.drop(self._staged)
            self._staged = None
