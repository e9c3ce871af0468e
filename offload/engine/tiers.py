"""Opens the tiers that hold a model's weights, and the links from them into slots.

Only this file opens tiers of weights. `Binding` (weights) is given the host tier, and
binds its units where they lie.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial

import torch

from ...io.checkpoint.index import Checkpoint
from ...io.closing import Closing
from ...io.codecs.whole import WHOLE
from ...io.devices.accelerators import reaches
from ...io.devices.device import Device
from ...io.devices.opening import open_device
from ...io.event import Event
from ...io.fallbacks import Fallbacks
from ...io.memory.arena import Arena, HostMemory, Memory
from ...io.memory.host_buffers import HostBuffers
from ...io.memory.pinned import Pinned
from ...io.pace import Pace
from ...io.sharing.ring import Seat
from ...io.tier import Tier, tier_of
from ...io.timeline import Record
from ...io.weights.direct import DirectToDevice, by_unit, made_units
from ...io.weights.host import HostTier
from ...io.weights.layout import Layout
from ...io.weights.link import Link
from ...io.weights.load import Load
from ...io.weights.loader import Loader
from ...io.weights.peer import PeerTier
from ...io.weights.source import ResidentSource, Source, StagedSource
from ...io.weights.stored_image import StoredImage
from ...io.weights.transfer import Transfer
from ...scheduler.activations.activation_offload import MIN_BYTES, ActivationOffload
from ...scheduler.activations.ownership import Ownership
from ..monitoring.progress import FillProgress
from ..policy import Policy, throttle
from ..ranks.gathered_loads import GatheredLoads
from ..settings.installed import version_of
from .kept import KeptUnits
from .readers import Drive, kernels_for, open_gds


class Tiers(Closing):
    """Keeps each unit of `layouts` in the tier that `placement` says, and loads it from
    there into slots of `memory`. If the constructor raises, nothing stays open."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layouts: Sequence[Layout],
        transfers: Sequence[Transfer],
        placement: Sequence[str],
        device: Device,
        capacity: int,
        policy: Policy,
        record: Record,
        fallbacks: Fallbacks,
        images: Sequence[StoredImage] | None = None,
        seat: Seat | None = None,
    ) -> None:
        self.device = device
        self.placement = list(placement)
        self.links: list[Link] = []
        self.host: HostTier | None = None
        self.peers: list[PeerTier] = []
        self._pinned: list[Pinned] = []
        self._activation_offloads: list[ActivationOffload] = []
        self.direct_to_device: DirectToDevice | None = None
        self.gathered: GatheredLoads | None = None
        self._checkpoint = checkpoint
        self._ownership: Ownership | None = None
        self._layouts = layouts
        self._policy, self._fallbacks = policy, fallbacks
        self._record = record
        self._transfers = dict(enumerate(transfers))
        self.kept = KeptUnits(layouts, transfers, images, policy.staging_memory)
        self._loads: dict[str, Callable[[int, int, tuple[Event, ...]], Load]] = {}
        with ExitStack() as opened:
            self.memory: Memory = device.allocate(capacity)
            opened.enter_context(closing(self.memory))
            io = policy.io
            if io.reader == "gds" and not device.is_host:  # for what gds cannot read
                io = io.model_copy(update={"reader": "auto"})
            self.drive = Drive(checkpoint.stamps, io, fallbacks, seat)
            opened.enter_context(self.drive)
            self.layered = self.drive.layered
            kernels = kernels_for(layouts, policy.io, fallbacks)
            self._loader_of = partial(
                Loader, reader=self.layered, bounce_bytes=io.bounce, kernels=kernels
            )
            on_device = kernels if device.is_host else WHOLE
            self._link = partial(Link, kernels=on_device, record=record)
            self.loaders: list[Loader | DirectToDevice] = []
            self._open_disk(opened)
            for name in policy.peer:
                self._open_peer(name, opened)
            self._open_host(opened)
            self._opened = opened.pop_all()

    def __repr__(self) -> str:
        counts = {tier: self.placement.count(tier) for tier in set(self.placement)}
        return f"<Tiers: units {counts} for {self.device.name}>"

    @property
    def in_place(self) -> HostTier | None:
        """The host tier, if its units are computed with in place; else None."""
        return None if Tier.HOST in self._loads else self.host

    def load(self, unit: int, offset: int, after: tuple[Event, ...]) -> Load:
        """Starts to load `unit` into the slot at `offset` (bytes), after the events."""
        # Units that stay on the device have no link: they come from disk, once.
        disk = self._loads[Tier.DISK]
        return self._loads.get(self.placement[unit], disk)(unit, offset, after)

    def mark(self) -> Event | None:
        """An event after all device work queued so far; None on the CPU."""
        return None if self.device.is_host else self.device.compute.record()

    def activation_offload(self) -> ActivationOffload:
        """Makes the activation offload of one sweep."""
        if self._ownership is None:  # its patterns hold for all sweeps
            device = torch.device(self.device.name)
            self._ownership = Ownership(device, min_bytes=MIN_BYTES)
        buffers = HostBuffers(self.pin)
        activation_offload = ActivationOffload(
            self.device, buffers, self._ownership, self._record
        )
        self._activation_offloads = [
            e for e in self._activation_offloads if not e.is_closed
        ] + [activation_offload]
        return activation_offload

    def pin(self, memory: Arena) -> Pinned | None:
        """Page-locks `memory` for copies to the device, as far as the policy allows."""
        return self._pin(memory, self.device)

    def bytes_read(self) -> dict[str, int]:
        """The bytes loaded from each tier so far."""
        by_tier: dict[str, int] = {Tier.DISK: self.drive.bytes_read}
        if self.direct_to_device is not None:
            by_tier[Tier.DISK] += self.direct_to_device.bytes_read
        for link in self.links:
            if link.tier != Tier.DISK:
                tier = tier_of(link.tier)
                by_tier[tier] = by_tier.get(tier, 0) + link.statistics().bytes_moved
        return by_tier

    def close(self) -> None:
        """Waits for all work, ends the threads and frees the memory."""
        with self._opened:  # closed even if the device has failed
            for activation_offload in self._activation_offloads:
                activation_offload.close()
            self.device.synchronize()

    def _units_of(self, tier: str) -> tuple[int, ...]:
        return tuple(u for u, where in enumerate(self.placement) if where == tier)

    def _loader(self, layouts: Sequence[Layout], memory: Arena) -> Loader:
        loader = self._loader_of(layouts, memory, record=self._record)
        self.loaders.append(loader)
        return loader

    def _open_disk(self, opened: ExitStack) -> None:
        """Units are read directly into slots if the reader can, else through a ring
        buffer in host memory."""
        direct = self._open_direct_to_device(opened)
        if direct is not None and not (made := made_units(self._layouts)):
            self._loads[Tier.DISK] = direct.load
            return
        if self.device.is_host and Tier.DISK not in self._policy.links:
            assert isinstance(self.memory, Arena), "memory of the host"
            loader = self._loader(self._layouts, self.memory)
            opened.callback(loader.close)
            self._loads[Tier.DISK] = loader.load
            return
        link = opened.enter_context(
            self._link_from_disk(self.kept.transfers, self.memory, self.device)
        )
        self.links.append(link)
        self._loads[Tier.DISK] = link.load
        if direct is not None:
            self._loads[Tier.DISK] = by_unit(made, link.load, direct.load)

    def _open_direct_to_device(self, opened: ExitStack) -> DirectToDevice | None:
        """By cuFile, where system, drive and driver allow it."""
        if self.device.is_host or self._policy.io.reader != "gds":
            return None  # `open_reader` has announced that
        io, announced = self._policy.io, self._fallbacks
        stamps = self._checkpoint.stamps
        reader = open_gds(self.device.name, self._layouts, stamps, io, announced)
        if reader is None:
            return None
        opened.enter_context(reader)
        direct = partial(DirectToDevice, reader=reader, record=self._record)
        self.direct_to_device = opened.enter_context(
            direct(self._layouts, self._transfers, self.memory)
        )
        self.loaders.append(self.direct_to_device)
        return self.direct_to_device

    def link_to_peer(self, target: Memory, device: Device) -> Link:
        """A link from the checkpoint's files into the memory `target` of `device`,
        where units lie as peers keep them."""
        return self._link_from_disk(self.kept.to_peer, target, device)

    def _link_from_disk(
        self, transfers: Mapping[int, Transfer], target: Memory, device: Device
    ) -> Link:
        memory = Arena(self.kept.staging_bytes)
        self._fallbacks.announce(device.settle(memory))
        pinned = self._pin(memory, device)
        source = StagedSource(
            self._loader(self.kept.layouts, memory),
            self.kept.layouts,
            memory,
            pinned=pinned,
        )
        pace = throttle(self._policy, Tier.DISK)
        return self._link(Tier.DISK, source, transfers, target, device, pace=pace)

    def _open_peer(self, name: str, opened: ExitStack) -> None:
        units = self._units_of(name)
        if not units:
            return
        device = open_device(name)
        is_over_host = not (self.device.is_host or device.is_host)
        if is_over_host and not reaches(self.device.name, device.name):
            self._fallbacks.announce(
                f"{self.device.name} cannot reach the memory of {name} directly: its "
                "weights go through the host"
            )
        with FillProgress(f"reading into {name}") as progress:
            peer = opened.enter_context(
                PeerTier(
                    self.kept.to_peer,
                    units,
                    device,
                    open_link=self.link_to_peer,
                    progress=progress,
                )
            )
        self.peers.append(peer)
        source = ResidentSource(peer.memory, peer.offsets, peer.moved)
        pace = throttle(self._policy, Tier.PEER)
        self._open_link(name, source, self.kept.from_peer, pace, opened)

    def _open_host(self, opened: ExitStack) -> None:
        units = self._units_of(Tier.HOST)
        if not units:
            return
        reader = self.drive.loading(for_all=self._policy.host_shared)
        with FillProgress("reading into host memory") as progress:
            self.host = opened.enter_context(
                HostTier(
                    self.kept.layouts,
                    units,
                    partial(self._loader_of, self.kept.layouts, reader=reader),
                    self._checkpoint.stamps,
                    shared=self._policy.host_shared,
                    version=f"{version_of('penstock')} {version_of('transformers')}",
                    prepare=lambda it: self._fallbacks.announce(self.device.settle(it)),
                    progress=progress,
                )
            )
        pace = throttle(self._policy, Tier.HOST)
        if not self.device.is_host or pace is not None or self.kept.are_images:
            host = self.host
            pin = self._pin(host.memory, self.device)
            source = ResidentSource(host.memory, host.offsets, host.moved, pinned=pin)
            self._open_link(Tier.HOST, source, self.kept.transfers, pace, opened)

    def _pin(self, memory: HostMemory, device: Device) -> Pinned | None:
        asked = self._policy.pinned_memory
        self._pinned = [p for p in self._pinned if p.pinned_bytes]  # drop closed ones
        used = sum(p.pinned_bytes for p in self._pinned)
        left = memory.nbytes if asked == "auto" else max(asked - used, 0)
        pinned = device.pin(memory, left)
        if pinned is not None:
            self._pinned.append(pinned)
            self._fallbacks.announce(pinned.fallback)
        return pinned

    def _open_link(
        self,
        tier: str,
        source: Source,
        transfers: Mapping[int, Transfer],
        pace: Pace | None,
        opened: ExitStack,
    ) -> None:
        link = opened.enter_context(
            self._link(tier, source, transfers, self.memory, self.device, pace=pace)
        )
        self._loads[tier] = link.load
        self.links.append(link)
