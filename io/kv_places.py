"""How strips are kept in each tier."""

from collections import deque
from collections.abc import Callable
from contextlib import ExitStack

import torch

from .arena import Arena, HostMemory
from .closing import Closing
from .courier import Courier
from .device import Device, Stream
from .host_buffers import HostBuffers
from .kv_codec import Codec
from .kv_copied import CopiedStrip
from .kv_count import KvCount
from .kv_file import KvFile, pages
from .kv_file_region import FileRegion, Hop
from .kv_in_place import InPlaceStrip
from .kv_region import Leaving, MemoryRegion
from .kv_shape import KvShape
from .kv_staging import Staging
from .kv_strip import Lease, Strip
from .pace import Pace

PENDING_BYTES = 256 << 20
"""Most that waits to be written, beside what is being made."""

MakeCodec = Callable[[KvShape], Codec]


class InPlace(Closing):
    """Memory that attention reads directly."""

    def __init__(self, device: torch.device, count: KvCount) -> None:
        self._device = device
        self._count = count

    def bytes_of(self, shape: KvShape, capacity: int) -> int:
        return capacity * shape.row_bytes

    def open(self, shape: KvShape, capacity: int, lease: Lease) -> Strip:
        return InPlaceStrip(shape, capacity, self._device, lease, self._count)

    def close(self) -> None:
        """The memory goes with the strips."""


class Copied(Closing):
    """Host memory that is copied from and to: by streams of the device or, where it is
    the host, by threads, held to a `pace`."""

    def __init__(
        self,
        device: Device,
        staging: Staging,
        count: KvCount,
        make_codec: MakeCodec,
        *,
        pace: Callable[[], Pace | None],
        pin: Callable[[Arena], Closing | None],
    ) -> None:
        self._device = device
        self._staging = staging
        self._count = count
        self._make_codec = make_codec
        self._buffers = HostBuffers(pin)
        self._returned: deque[HostMemory] = deque()
        self._leaving = Leaving(device)
        with ExitStack() as opened:
            self._out = self._stream("kv-out", pace, opened)
            self._back = self._stream("kv-back", pace, opened)
            self._opened = opened.pop_all()

    def bytes_of(self, shape: KvShape, capacity: int) -> int:
        return capacity * self._make_codec(shape).row_bytes

    def open(self, shape: KvShape, capacity: int, lease: Lease) -> Strip:
        region = MemoryRegion(
            self._device,
            self._out,
            self._back,
            self._leaving,
            take=self._take,
            give_back=self._give_back,
        )
        region.grow(self.bytes_of(shape, capacity))
        return CopiedStrip(
            shape, self._make_codec, region, self._staging, lease, self._count
        )

    def close(self) -> None:
        """After all strips."""
        self._opened.close()
        self._device.synchronize()
        self._leaving.clear()
        self._returned.clear()
        self._buffers.close()

    def _stream(
        self, name: str, pace: Callable[[], Pace | None], opened: ExitStack
    ) -> Stream:
        if not self._device.is_host:
            return self._device.stream()
        courier = Courier(name, max_pending_bytes=PENDING_BYTES, pace=pace())
        return opened.enter_context(courier)

    def _take(self, nbytes: int) -> HostMemory:
        if self._device.is_host:
            return Arena(nbytes)
        while self._returned:  # locked in place already
            self._out.wait(self._back.record())
            buffer = self._returned.popleft()
            assert isinstance(buffer, Arena), "lent by the same buffers"
            self._buffers.give_back(buffer, self._out.record())
        return self._buffers.take(nbytes)

    def _give_back(self, memory: HostMemory) -> None:
        """On any thread."""
        if self._device.is_host:
            memory.close()  # or with the last copy that is under way
        else:
            self._returned.append(memory)


class OnDisk(Closing):
    """A file that is read and written by threads, for a device that is the host."""

    def __init__(
        self,
        device: Device,
        staging: Staging,
        count: KvCount,
        make_codec: MakeCodec,
        file: KvFile,
        hop: Hop,
    ) -> None:
        self._device = device
        self._staging = staging
        self._count = count
        self._make_codec = make_codec
        self._file = file
        self._hop = hop

    def bytes_of(self, shape: KvShape, capacity: int) -> int:
        return pages(capacity * self._make_codec(shape).row_bytes)

    def open(self, shape: KvShape, capacity: int, lease: Lease) -> Strip:
        region = FileRegion(self._file, self._device, self._hop)
        region.grow(self.bytes_of(shape, capacity))
        return CopiedStrip(
            shape, self._make_codec, region, self._staging, lease, self._count
        )

    def close(self) -> None:
        """After all strips."""
        self._file.close()
