"""What moves beside the micro-batches of a sweep: their activations, their caches."""

from collections.abc import Callable, Collection, Sequence

from ..activations.evacuation import ActivationOffload
from ..kv.store import KvStore
from .micro_batch import MicroBatch


class SideTransfers:
    """Tells those who move things, if there are any, whose turn it is."""

    def __init__(
        self, evacuation: ActivationOffload | None, kv: KvStore | None
    ) -> None:
        self._evacuation = evacuation
        self._kv = kv

    def begin_turn(self, index: int, upcoming: Callable[[], Sequence[int]]) -> None:
        """Micro-batch `index` is about to compute, and then, probably, those that are
        `upcoming`, the first of those that wait before the others."""
        if self._evacuation is None and self._kv is None:
            return
        soon = upcoming()
        if self._evacuation is not None:
            self._evacuation.begin_turn(index, soon[0] if soon else None)
        if self._kv is not None:
            self._kv.begin_turn(index, soon)

    def move_out(self, me: MicroBatch) -> None:
        """`me` waits for long."""
        if self._evacuation is not None:
            storages = me.own_storages(self._evacuation.ownership)
            self._evacuation.move_out(me.index, storages)

    def bring_back(self, index: int) -> None:
        """What micro-batch `index` holds may be looked at."""
        if self._evacuation is not None:
            self._evacuation.bring_back(index)

    def held_bytes(self, me: MicroBatch) -> int:
        """Bytes that `me` keeps alive, on the device or where activations go; not what
        its caches have elsewhere."""
        cached = 0 if self._kv is None else self._kv.device_bytes_of(me.index)
        return me.held_bytes() + cached

    def leave(self, me: MicroBatch) -> None:
        """`me` runs no more."""
        if self._evacuation is not None:
            self._evacuation.ownership.forget(me.index)
        if self._kv is not None:
            self._kv.end(me.index, failed=me.error is not None or me.is_alive)

    def let_go(self, indices: Collection[int]) -> None:
        """Of those that another thread leaves, which run only to their ends: what they
        hold is back, and their caches make room for others', which may be known by the
        same numbers."""
        for index in indices:
            self.bring_back(index)
            if self._kv is not None:
                self._kv.end(index, failed=True)
        self._evacuation = self._kv = None

    def end_turn(self) -> None:
        """Who had the turn computes no more for now."""
        if self._kv is not None:
            self._kv.end_turn()
