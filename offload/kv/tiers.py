"""Opens the tiers that keep the keys and values of one model, as its policy says."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property

import torch
from torch import nn

from ...io.closing import Closing
from ...io.codecs.kernels import Kernels
from ...io.codecs.opening import open_kernels
from ...io.codecs.whole import WHOLE
from ...io.devices.device import Device, Stream
from ...io.fallbacks import Fallbacks
from ...io.kv.buffer_pool import BufferPool, DevicePool, PinnedPool, UnpinnedPool
from ...io.kv.codec import KvCodec, Plain, Quantised
from ...io.kv.count import KvCount
from ...io.kv.file import KvFile
from ...io.kv.host_bounce import HostBounce, NoBounce, ThroughHost
from ...io.kv.shape import KvShape
from ...io.kv.staging import Staging
from ...io.kv.tiers import PENDING_BYTES, CopiedTier, DiskTier, InPlaceTier
from ...io.kv.worker_stream import WorkerStream
from ...io.memory.arena import Arena
from ...io.tier import KV_TIERS, Tier
from ...io.timeline import Record
from ...scheduler.kv.budget import KvBudget
from ...scheduler.kv.store import KvStore, KvTier
from ..policy import Policy, cache_folder, throttle
from ..settings.contradictions import keeps_kv

_HOSTS = {Tier.DEVICE, Tier.HOST}
_KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}

Pin = Callable[[Arena], Closing | None]


class KvTiers(Closing):
    """The tiers and the store of one model, whose `generate` uses them until they are
    closed.

    `pin` pins host memory for copies to the device.
    """

    def __init__(
        self,
        model: nn.Module,
        device: Device,
        policy: Policy,
        pin: Pin,
        record: Record,
        free_bytes: int,
        fallbacks: Fallbacks,
    ) -> None:
        from .cache import install  # transformers takes seconds to import

        kv = policy.kv
        asked = Tier.DEVICE if kv.tier == "auto" else kv.tier
        tiers: Sequence[str] = KV_TIERS[KV_TIERS.index(Tier(asked)) :]
        self._device = device
        self._policy = policy
        self._pin = pin
        self._record = record
        self._free_bytes = free_bytes
        self._fallbacks = fallbacks
        self._count = KvCount()
        self._kind = _KINDS.get(kv.dtype)
        limits = {tier: self._limit(tier) for tier in tiers}
        if device.is_host and Tier.DEVICE in tiers and not kv.limits.keys() & _HOSTS:
            limits[Tier.HOST] = 0  # it is the same memory, and has the room of both
        with ExitStack() as opened:
            self._attends_there = self._attend_there(model, opened)
            self._staging = opened.enter_context(
                Staging(
                    device, None if kv.staging_memory == "auto" else kv.staging_memory
                )
            )
            opened_tiers = {tier: self._open_tier(tier, opened) for tier in tiers}
            self.store = KvStore(
                KvBudget(tiers, limits), opened_tiers, self._count, fallbacks
            )
            opened.enter_context(self.store)
            if self._kind is not None:
                fallbacks.announce(
                    f"kv: keys and values are kept as {kv.dtype}, which loses some of "
                    "them: what is generated may differ"
                )
            opened.callback(install(model, self.store))
            self._opened = opened.pop_all()

    def close(self) -> None:
        self._opened.close()

    def _open_tier(self, tier: str, opened: ExitStack) -> KvTier:
        device = self._device
        pace = throttle(self._policy, tier)
        if tier == Tier.HOST and self._attends_there:
            return InPlaceTier(torch.device("cpu"), self._count)
        is_there = tier == Tier.DEVICE
        is_there |= tier == Tier.HOST and device.is_host and not pace
        if tier == Tier.DISK:
            return opened.enter_context(self._on_disk())
        if is_there and self._kind is None:
            return InPlaceTier(torch.device(device.name), self._count)
        pool: BufferPool
        out: Stream
        back: Stream
        if is_there:
            out, back, pool = device.compute, device.compute, DevicePool(device)
        elif device.is_host:
            out, back = (
                opened.enter_context(
                    WorkerStream(
                        name,
                        max_pending_bytes=PENDING_BYTES,
                        pace=throttle(self._policy, tier),
                        record=self._record,
                    )
                )
                for name in ("kv-out", "kv-back")
            )
            pool = UnpinnedPool()
        else:
            out, back = device.stream(), device.stream()
            pool = PinnedPool(self._pin, out, back)
        return opened.enter_context(
            CopiedTier(
                device,
                self._staging,
                self._count,
                self._codec,
                out=out,
                back=back,
                pool=pool,
            )
        )

    def _attend_there(self, model: nn.Module, opened: ExitStack) -> bool:
        """Whether the CPU attends to keys and values in host memory, beside a GPU."""
        if self._policy.kv.attention != "host" or self._device.is_host:
            return False
        from .attention import install

        undo = install(model)
        if undo is None:
            self._fallbacks.announce(
                f"kv.attention: {type(model).__name__} has another attention than "
                "sdpa: it attends on the device"
            )
            return False
        opened.callback(undo)
        return True

    def _codec(self, shape: KvShape) -> KvCodec:
        if self._kind is None:
            return Plain(shape)
        return Quantised(shape, self._kind, self._kernels)

    @cached_property
    def _kernels(self) -> Kernels:
        if not self._device.is_host:
            return WHOLE
        folder = cache_folder(self._policy.io)
        return open_kernels(folder, self._fallbacks, "keys and values")

    def _on_disk(self) -> DiskTier:
        device = self._device
        bounce: HostBounce = NoBounce()
        if not device.is_host:
            bounce = ThroughHost(device, device.stream(), device.stream(), self._pin)
        return DiskTier(
            device, self._staging, self._count, self._codec, self._open_file, bounce
        )

    def _open_file(self) -> KvFile:
        io = self._policy.io
        file = KvFile(
            cache_folder(io),
            direct=io.direct,
            max_pending_bytes=PENDING_BYTES,
            write_pace=throttle(self._policy, Tier.DISK),
            read_pace=throttle(self._policy, Tier.DISK),
            record=self._record,
        )
        self._fallbacks.announce(file.fallback)
        return file

    def _limit(self, tier: str) -> int:
        asked = self._policy.kv.limits.get(tier)  # type: ignore[call-overload]
        if asked is not None:
            return int(asked)
        if tier == Tier.DISK:
            folder = cache_folder(self._policy.io).absolute()
            there = next(path for path in (folder, *folder.parents) if path.exists())
            return shutil.disk_usage(there).free
        on_gpu = self._device.free_bytes() if tier == Tier.DEVICE else None
        return self._free_bytes if on_gpu is None else on_gpu // 2


def open_kv(
    model: nn.Module,
    device: Device,
    policy: Policy,
    pin: Pin,
    record: Record,
    free_bytes: int,
    fallbacks: Fallbacks,
) -> KvTiers | None:
    """Opens the tiers for `model`.

    Returns None if the policy leaves the cache as transformers makes it, or the model
    cannot generate. `free_bytes` of host memory may be used in tiers that the policy
    does not limit.
    """
    if not keeps_kv(policy) or not callable(getattr(model, "generate", None)):
        return None
    return KvTiers(model, device, policy, pin, record, free_bytes, fallbacks)
