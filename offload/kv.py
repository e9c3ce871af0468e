"""Opens the tiers that keep the keys and values of one model, as its policy says."""

import logging
from collections.abc import Callable

import torch
from torch import nn

from ..io.closing import Closing
from ..io.device import Device
from ..io.kv_count import KvCount
from ..io.kv_in_place import InPlaceStrip
from ..io.kv_shape import KvShape
from ..io.kv_strip import Lease, Strip
from ..scheduler.kv_budget import TIERS, KvBudget
from ..scheduler.kv_store import KvStore, Place
from .memory import available_bytes
from .policy import Policy

_log = logging.getLogger("penstock")


class KvTiers(Closing):
    """The store of one model, in whose `generate` it is installed until it is
    closed."""

    def __init__(self, model: nn.Module, device: Device, policy: Policy) -> None:
        from .kv_cache import install  # transformers takes seconds to import

        kv = policy.kv
        asked = "device" if kv.tier == "auto" else kv.tier
        tiers = TIERS[TIERS.index(asked) :]
        count = KvCount()
        self._device = device
        self._policy = policy
        self._count = count
        places = {tier: self._place(tier) for tier in tiers}
        limits = {tier: self._limit(tier) for tier in tiers}
        if kv.memory != "auto":
            limits[asked] = kv.memory
        self.store = KvStore(KvBudget(tiers, limits), places, count)
        self._uninstall: Callable[[], None] = install(model, self.store)

    def close(self) -> None:
        self._uninstall()
        self.store.close()

    def _place(self, tier: str) -> Place:
        return InPlace(torch.device(self._device.name), self._count)

    def _limit(self, tier: str) -> int:
        asked = self._policy.kv.limits.get(tier)  # type: ignore[call-overload]
        if asked is not None:
            return int(asked)
        on_gpu = self._device.free_bytes() if tier == "device" else None
        return (available_bytes() if on_gpu is None else on_gpu) // 2


class InPlace:
    """Memory that attention reads directly."""

    def __init__(self, device: torch.device, count: KvCount) -> None:
        self._device = device
        self._count = count

    def bytes_of(self, shape: KvShape, capacity: int) -> int:
        return capacity * shape.row_bytes

    def open(self, shape: KvShape, capacity: int, lease: Lease) -> Strip:
        return InPlaceStrip(shape, capacity, self._device, lease, self._count)

    def close(self) -> None:
        """It goes with the strips."""


def open_kv(model: nn.Module, device: Device, policy: Policy) -> KvTiers | None:
    """None where the cache is to stay as transformers makes it."""
    is_asked = policy.kv.tier != "auto" or policy.kv.dtype != "auto"
    if not is_asked or not callable(getattr(model, "generate", None)):
        return None
    return KvTiers(model, device, policy)
