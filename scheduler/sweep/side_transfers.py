"""Moves activations and caches of the micro-batches of a sweep while others compute."""

from collections.abc import Callable, Collection, Sequence

from ..activations.activation_offload import ActivationOffload
from ..kv.store import KvStore
from .micro_batch import MicroBatch


class SideTransfers:
    """Tells the activation offload and the store of keys and values, where the policy
    uses them, which micro-batch computes now and which ones follow."""

    def __init__(
        self, activation_offload: ActivationOffload | None, kv: KvStore | None
    ) -> None:
        self._activation_offload = activation_offload
        self._kv = kv

    def begin_turn(self, index: int, upcoming: Callable[[], Sequence[int]]) -> None:
        """Micro-batch `index` is about to compute. `upcoming` returns the ones that
        will probably compute after it, in that order."""
        if self._activation_offload is None and self._kv is None:
            return
        soon = upcoming()
        if self._activation_offload is not None:
            self._activation_offload.begin_turn(index, soon[0] if soon else None)
        if self._kv is not None:
            self._kv.begin_turn(index, soon)

    def move_out(self, me: MicroBatch) -> None:
        """Starts to move out the activations of `me`, which is suspended at a site."""
        if self._activation_offload is not None:
            storages = me.own_storages(self._activation_offload.ownership)
            self._activation_offload.move_out(me.index, storages)

    def bring_back(self, index: int) -> None:
        """Moves the activations of micro-batch `index` back, if they are away."""
        if self._activation_offload is not None:
            self._activation_offload.bring_back(index)

    def held_bytes(self, me: MicroBatch) -> int:
        """The bytes that `me` keeps alive: its activations, wherever they are, and the
        part of its caches that is on the device."""
        cached = 0 if self._kv is None else self._kv.device_bytes_of(me.index)
        return me.held_bytes() + cached

    def leave(self, me: MicroBatch) -> None:
        """Forgets `me`, which has ended, and closes its caches if it failed."""
        if self._activation_offload is not None:
            self._activation_offload.ownership.forget(me.index)
        if self._kv is not None:
            self._kv.end(me.index, failed=me.error is not None or me.is_alive)

    def let_go(self, indices: Collection[int]) -> None:
        """Brings back the activations of the micro-batches `indices` and closes their
        caches. Another thread has closed the sweep, and they will only be ended.
        Micro-batches of the next sweep may have the same numbers."""
        for index in indices:
            self.bring_back(index)
            if self._kv is not None:
                self._kv.end(index, failed=True)
        self._activation_offload = self._kv = None

    def end_turn(self) -> None:
        """The micro-batch of `begin_turn` has stopped computing for now."""
        if self._kv is not None:
            self._kv.end_turn()
