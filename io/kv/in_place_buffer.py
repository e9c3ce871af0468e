"""A layer buffer that attention reads in place: only new tokens are copied."""

from dataclasses import replace

import torch

from ..errors import ClosedError
from .count import KvCount
from .layer_buffer import KvLayerBuffer, Lease, Pair
from .shape import KvShape
from .storage import GONE

_GROWTH = 1.25


class InPlaceBuffer(KvLayerBuffer):
    """Keeps keys and values as [batch, heads, `capacity`, dim]; returns views of them.

    When tokens exceed `capacity`, they move to the start if enough older ones are
    forgotten; otherwise all are copied to larger memory. On the CPU, memory that was
    never written to takes no space.
    """

    _pair: Pair | None = None

    def __init__(
        self,
        shape: KvShape,
        capacity: int,
        device: torch.device,
        lease: Lease,
        count: KvCount,
    ) -> None:
        self.shape = shape
        self._device = device
        self._lease = lease
        self._count = count
        self._low = 0
        self._high = 0
        self._pair = self._allocate(shape, capacity)

    def __repr__(self) -> str:
        state = "closed" if self._pair is None else f"{self._high - self._low} tokens"
        return f"<InPlaceBuffer: {state}, {self._lease.tier}>"

    @property
    def device_bytes(self) -> int:
        if self._pair is None or self._lease.tier != "device":
            return 0
        return self.capacity * self.shape.row_bytes

    @property
    def capacity(self) -> int:
        """Tokens that fit without a move."""
        return self._memory()[0].shape[2]

    def append(self, keys: torch.Tensor, values: torch.Tensor, start: int) -> Pair:
        """Copies [batch, heads, new tokens, dim] behind the kept tokens.

        Returns views of all tokens from number `start` on. Raises DoesNotFitError.
        """
        num = keys.shape[2]
        if self._high + num > self.capacity:
            self._make_room(num)
        for kept, new in zip(self._memory(), (keys, values), strict=True):
            kept[:, :, self._high : self._high + num].copy_(new)
        self._high += num
        self.length += num
        nbytes = num * self.shape.row_bytes
        self._count.append(self._lease.tier, num * self.shape.batch, nbytes)
        return self.view(start)

    def view(self, start: int) -> Pair:
        """Views of all tokens from number `start` on."""
        assert start >= self.first, "forgotten tokens cannot be viewed"
        keys, values = self._memory()
        low = self._low + start - self.first
        return keys[:, :, low : self._high], values[:, :, low : self._high]

    def forget(self, before: int) -> None:
        self._low += before - self.first
        self.first = before

    def truncate(self, length: int) -> None:
        self._high -= self.length - length
        self.length = length

    def select(self, rows: torch.Tensor) -> None:
        """Copies the selected sequences; `rows` is int64 [new batch]."""
        rows = rows.to(self._device)
        selected = [part.index_select(0, rows) for part in self.view(self.first)]
        if rows.shape[0] != self.shape.batch:
            shape = replace(self.shape, batch=rows.shape[0])
            self._lease.resize(self.capacity * shape.row_bytes)
            self._pair, self.shape = self._allocate(shape, self.capacity), shape
        self._put(selected, self._low)

    def close(self) -> None:
        if self._pair is not None:
            self._pair = None
            self._lease.give_back()

    def _memory(self) -> Pair:
        if self._pair is None:
            raise ClosedError(GONE)
        return self._pair

    def _make_room(self, num: int) -> None:
        kept = self._high - self._low
        pair: list[torch.Tensor] = list(self.view(self.first))
        if 2 * kept + num <= self.capacity:
            pair = [part.clone() for part in pair]
        else:
            capacity = int(max(2 * kept + num, self.capacity) * _GROWTH)
            self._lease.resize(capacity * self.shape.row_bytes)
            self._pair = self._allocate(self.shape, capacity)
        self._put(pair, 0)

    def _put(self, pair: list[torch.Tensor], low: int) -> None:
        """Copies the kept keys and values to the positions from `low` on."""
        kept = self._high - self._low
        for part, old in zip(self._memory(), pair, strict=True):
            part[:, :, low : low + kept].copy_(old)
        self._low, self._high = low, low + kept
        self._count.moved += kept * self.shape.row_bytes

    def _allocate(self, shape: KvShape, capacity: int) -> Pair:
        sizes = (
            (shape.batch, shape.key_heads, capacity, shape.key_dim),
            (shape.batch, shape.value_heads, capacity, shape.value_dim),
        )
        with torch.inference_mode(False):  # so that it can be written outside that mode
            keys, values = (
                torch.empty(size, dtype=shape.dtype, device=self._device)
                for size in sizes
            )
        return keys, values
