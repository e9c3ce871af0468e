"""The keys and values of all caches of one model. A buffer is opened in a tier that has
room, prefetched before its micro-batch computes, and freed with its cache."""

import gc
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Protocol
from weakref import WeakSet, WeakValueDictionary

from ...io.closing import Closing
from ...io.errors import ClosedError, DoesNotFitError
from ...io.fallbacks import Fallbacks
from ...io.kv.count import KvCount, KvStatistics
from ...io.kv.layer_buffer import KvLayerBuffer, Lease
from ...io.kv.shape import KvShape
from .budget import KvBudget

Key = tuple[str, int]
"""Which part of a cache (`self`, `cross`), and which of its layers."""


class KvTier(Protocol):
    """Makes layer buffers in one tier. Each holds the keys and values of one layer."""

    def bytes_of(self, shape: KvShape, capacity: int) -> int:
        """The bytes that `capacity` tokens of one layer take in this tier."""
        ...

    def open(self, shape: KvShape, capacity: int, lease: Lease) -> KvLayerBuffer: ...


class KvLease:
    """Bytes taken from the budget of one tier, until `give_back`."""

    def __init__(self, budget: KvBudget, tier: str, nbytes: int) -> None:
        self.tier = tier
        self._budget = budget
        self._nbytes = nbytes

    def resize(self, nbytes: int) -> None:
        self._budget.resize(self.tier, self._nbytes, nbytes)
        self._nbytes = nbytes

    def give_back(self) -> None:
        nbytes, self._nbytes = self._nbytes, 0
        self._budget.give_back(self.tier, nbytes)


class CacheHandle:
    """One cache of micro-batch `index`, or of a plain call (None). It refers weakly to
    its buffers, which the layers of the cache own."""

    def __init__(self, index: int | None) -> None:
        self.index = index
        self.last: Key | None = None
        """The key that was used last."""
        self.touched_at = 0
        """The store's count of touches at that time."""
        self.buffers: WeakValueDictionary[Key, KvLayerBuffer] = WeakValueDictionary()


class KvStore(Closing):
    """All caches of one model. Methods are called by the thread that has the turn to
    run the model, unless they say otherwise."""

    def __init__(
        self,
        budget: KvBudget,
        tiers: Mapping[str, KvTier],
        count: KvCount,
        fallbacks: Fallbacks,
    ) -> None:
        self.fallbacks = fallbacks
        self._budget = budget
        self._tiers = tiers
        self._count = count
        self._handles: WeakSet[CacheHandle] = WeakSet()
        self._handles_of: dict[int, WeakSet[CacheHandle]] = {}
        self._successor: dict[Key, Key] = {}
        self._num_touches = 0
        self._running: int | None = None
        self._thread = 0
        """The number of the thread that runs `_running`."""
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<KvStore: {len(self._handles)} caches, {self._budget!r}>"

    # Called by caches.

    def begin(self) -> CacheHandle:
        """Registers a new cache of the running micro-batch, or of a plain call. May be
        called by any thread."""
        if self._is_closed:
            raise ClosedError("this model is closed; load it again")
        is_plain = threading.get_ident() != self._thread
        handle = CacheHandle(None if is_plain else self._running)
        self._handles.add(handle)
        if handle.index is not None:
            self._handles_of.setdefault(handle.index, WeakSet()).add(handle)
        return handle

    def open(
        self, handle: CacheHandle, key: Key, shape: KvShape, capacity: int
    ) -> KvLayerBuffer:
        """Opens a buffer for `capacity` tokens in the first tier that has room for them
        all. Raises DoesNotFitError if none has."""
        if self._is_closed:
            raise ClosedError("this model is closed; load it again")
        needs = {t: p.bytes_of(shape, capacity) for t, p in self._tiers.items()}
        tier = self._take(needs)
        lease = KvLease(self._budget, tier, needs[tier])
        try:
            buffer = self._tiers[tier].open(shape, capacity, lease)
        except BaseException:
            lease.give_back()
            raise
        handle.buffers[key] = buffer
        asked = next(iter(self._tiers))
        if tier != asked:
            self.fallbacks.announce(
                f"kv: no more room in {asked}: keys and values go to {tier}"
            )
        return buffer

    def touch(self, handle: CacheHandle, key: Key) -> None:
        """The buffer `key` of `handle` is about to be used: learns which key follows
        which."""
        if handle.last is not None and handle.last != key:
            self._successor[handle.last] = key
        handle.last = key
        self._num_touches += 1
        handle.touched_at = self._num_touches
        if handle.index is None:
            self._prefetch(handle)

    # Called by the sweep loop.

    def begin_turn(self, index: int, soon: Iterable[int]) -> None:
        """Micro-batch `index` is about to compute, and those of `soon` after it.
        Prefetches their buffers. The cache that was used longest ago comes first, since
        it will probably be used first."""
        self._running, self._thread = index, threading.get_ident()
        turns = dict.fromkeys((index, *soon))
        coming = [handle for each in turns for handle in self._handles_of.get(each, ())]
        for handle in sorted(coming, key=lambda handle: handle.touched_at):
            if not self._prefetch(handle):
                break

    def end(self, index: int, *, failed: bool) -> None:
        """Micro-batch `index` has ended. A cache that it made lives on only if its
        function returned it."""
        for handle in self._handles_of.pop(index, ()):
            if failed:  # whoever keeps the error would keep its frames and the cache
                _close(handle)

    def end_turn(self) -> None:
        """No micro-batch runs: a cache that is made now belongs to a plain call."""
        self._running = None

    def device_bytes_of(self, index: int) -> int:
        """The bytes of device memory that the caches of micro-batch `index` take."""
        return sum(
            buffer.device_bytes
            for handle in self._handles_of.get(index, ())
            for buffer in handle.buffers.values()
        )

    def statistics(self) -> KvStatistics:
        return self._count.statistics(self._budget.held, self._budget.peak)

    def close(self) -> None:
        """Frees all buffers, even if a cache still refers to them."""
        if self._is_closed:
            return
        self._is_closed = True
        for handle in list(self._handles):
            _close(handle)

    def _take(self, needs: Mapping[str, int]) -> str:
        """Takes `needs` from the budget and returns the tier. Without room, frees the
        caches in reference cycles (an error and its own frames) and tries again."""
        try:
            return self._budget.take(needs)
        except DoesNotFitError:
            gc.collect()
        return self._budget.take(needs)

    def _prefetch(self, handle: CacheHandle) -> bool:
        """Starts to fetch the buffer that `handle` will probably use next.

        Returns False if there is no room for it now.
        """
        key = None if handle.last is None else self._successor.get(handle.last)
        buffer = None if key is None else handle.buffers.get(key)
        if buffer is not None:
            with suppress(Exception):  # raised again when the buffer is used
                return buffer.prefetch()
        return True


def _close(handle: CacheHandle) -> None:
    for buffer in list(handle.buffers.values()):
        buffer.close()
