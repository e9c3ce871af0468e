"""The keys and values of all caches of one model: opened in the tier that has room,
fetched ahead for who follows, freed with the cache or the micro-batch that they belong
to."""

import gc
import logging
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Protocol
from weakref import WeakSet, WeakValueDictionary

from ...io.closing import Closing
from ...io.errors import ClosedError, DoesNotFitError
from ...io.kv.count import KvCount, KvStatistics
from ...io.kv.shape import KvShape
from ...io.kv.strip import KvLayerBuffer, Lease
from .budget import KvBudget

_log = logging.getLogger("penstock")

Key = tuple[str, int]
"""Which part of a cache (`self`, `cross`), and which of its layers."""


class KvTier(Protocol):
    """How strips are kept in one tier."""

    def bytes_of(self, shape: KvShape, capacity: int) -> int:
        """What `capacity` tokens take there."""
        ...

    def open(self, shape: KvShape, capacity: int, lease: Lease) -> KvLayerBuffer: ...


class KvLease:
    """Bytes of one tier's budget."""

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
    """One cache of micro-batch `index`, or of a plain call (None). Its strips live as
    long as the layers that hold them."""

    def __init__(self, index: int | None) -> None:
        self.index = index
        self.last: Key | None = None
        """What was touched last."""
        self.touched_at = 0
        """When that was, in touches of the store."""
        self.strips: WeakValueDictionary[Key, KvLayerBuffer] = WeakValueDictionary()


class KvStore(Closing):
    """For the thread that has the turn to run the model."""

    def __init__(
        self, budget: KvBudget, places: Mapping[str, KvTier], count: KvCount
    ) -> None:
        self.fallbacks: list[str] = []
        self._budget = budget
        self._places = places
        self._count = count
        self._series: WeakSet[CacheHandle] = WeakSet()
        self._of: dict[int, WeakSet[CacheHandle]] = {}
        self._successor: dict[Key, Key] = {}
        self._num_touches = 0
        self._running: int | None = None
        self._thread = 0
        """That of `_running`."""
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<KvStore: {len(self._series)} caches, {self._budget!r}>"

    # What a cache calls.

    def begin(self) -> CacheHandle:
        """A new cache, of who runs. May be called by any thread."""
        if self._is_closed:
            raise ClosedError("this model is closed; load it again")
        is_plain = threading.get_ident() != self._thread
        series = CacheHandle(None if is_plain else self._running)
        self._series.add(series)
        if series.index is not None:
            self._of.setdefault(series.index, WeakSet()).add(series)
        return series

    def open(
        self, series: CacheHandle, key: Key, shape: KvShape, capacity: int
    ) -> KvLayerBuffer:
        """A strip for `capacity` tokens, in the first tier that has room for them all.
        Raises DoesNotFitError when none has."""
        if self._is_closed:
            raise ClosedError("this model is closed; load it again")
        needs = {t: p.bytes_of(shape, capacity) for t, p in self._places.items()}
        tier = self._take(needs)
        lease = KvLease(self._budget, tier, needs[tier])
        try:
            strip = self._places[tier].open(shape, capacity, lease)
        except BaseException:
            lease.give_back()
            raise
        series.strips[key] = strip
        asked = next(iter(self._places))
        if tier != asked:
            self.note(f"kv: no more room in {asked}: keys and values go to {tier}")
        return strip

    def touch(self, series: CacheHandle, key: Key) -> None:
        """`key` of `series` is about to be used."""
        if series.last is not None and series.last != key:
            self._successor[series.last] = key
        series.last = key
        self._num_touches += 1
        series.touched_at = self._num_touches
        if series.index is None:
            self._prefetch(series)

    def note(self, fallback: str) -> None:
        """Announces, once, something that could not be had as asked."""
        if fallback not in self.fallbacks:
            self.fallbacks.append(fallback)
            _log.warning(fallback)

    # What the hub calls.

    def begin_turn(self, index: int, soon: Iterable[int]) -> None:
        """Micro-batch `index` is about to compute, and others `soon`: who used its keys
        and values longest ago will probably use the next ones first."""
        self._running, self._thread = index, threading.get_ident()
        turns = dict.fromkeys((index, *soon))
        coming = [series for each in turns for series in self._of.get(each, ())]
        for series in sorted(coming, key=lambda series: series.touched_at):
            if not self._prefetch(series):
                break

    def end(self, index: int, *, failed: bool) -> None:
        """Micro-batch `index` has ended. What it made lives on only if it returned
        it."""
        for series in self._of.pop(index, ()):
            if failed:  # the error may be kept, and with it all that it came through
                _close(series)

    def end_turn(self) -> None:
        """Nobody's turn: who makes a cache now does it in a plain call."""
        self._running = None

    def device_bytes_of(self, index: int) -> int:
        """What micro-batch `index` has in the device's memory."""
        return sum(
            strip.device_bytes
            for series in self._of.get(index, ())
            for strip in series.strips.values()
        )

    def statistics(self) -> KvStatistics:
        return self._count.statistics(self._budget.held, self._budget.peak)

    def close(self) -> None:
        """Frees everything, whoever still refers to it."""
        if self._is_closed:
            return
        self._is_closed = True
        for series in list(self._series):
            _close(series)

    def _take(self, needs: Mapping[str, int]) -> str:
        """The tier that keeps them. No room is only said when caches that nothing but
        garbage refers to (an error in its own traceback's frames) are freed."""
        try:
            return self._budget.take(needs)
        except DoesNotFitError:
            gc.collect()
        return self._budget.take(needs)

    def _prefetch(self, series: CacheHandle) -> bool:
        """What `series` will use next, as far as is known. False if there is no room
        for it now."""
        key = None if series.last is None else self._successor.get(series.last)
        strip = None if key is None else series.strips.get(key)
        if strip is not None:
            with suppress(Exception):  # raised again to who needs it
                return strip.prefetch()
        return True


def _close(series: CacheHandle) -> None:
    for strip in list(series.strips.values()):
        strip.close()
