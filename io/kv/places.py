"""How strips are kept in each tier."""

from abc import abstractmethod
from collections.abc import Callable

import torch

from ..closing import Closing
from ..devices.device import Device, Stream
from .codec import Codec
from .copied import CopiedStrip
from .count import KvCount
from .file import KvFile, pages
from .file_region import FileRegion
from .hop import HostBounce
from .in_place import InPlaceStrip
from .lender import BufferPool
from .region import KvStorage, Leaving, MemoryRegion
from .shape import KvShape
from .staging import Staging
from .strip import KvLayerBuffer, Lease

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

    def open(self, shape: KvShape, capacity: int, lease: Lease) -> KvLayerBuffer:
        return InPlaceStrip(shape, capacity, self._device, lease, self._count)

    def close(self) -> None:
        """The memory goes with the strips."""


class _Elsewhere(Closing):
    """What is brought to where attention reads it."""

    def __init__(self, staging: Staging, count: KvCount, make_codec: MakeCodec) -> None:
        self._staging = staging
        self._count = count
        self._make_codec = make_codec

    def bytes_of(self, shape: KvShape, capacity: int) -> int:
        return capacity * self._make_codec(shape).row_bytes

    def open(self, shape: KvShape, capacity: int, lease: Lease) -> KvLayerBuffer:
        region = self._region()
        region.grow(self.bytes_of(shape, capacity))
        return CopiedStrip(
            shape, self._make_codec, region, self._staging, lease, self._count
        )

    @abstractmethod
    def _region(self) -> KvStorage: ...


class Copied(_Elsewhere):
    """Memory that is copied from and to by two streams, which `lender` lends."""

    def __init__(
        self,
        device: Device,
        staging: Staging,
        count: KvCount,
        make_codec: MakeCodec,
        *,
        out: Stream,
        back: Stream,
        lender: BufferPool,
    ) -> None:
        super().__init__(staging, count, make_codec)
        self._device = device
        self._out = out
        self._back = back
        self._lender = lender
        self._leaving = Leaving(device)

    def _region(self) -> KvStorage:
        return MemoryRegion(
            self._device, self._out, self._back, self._leaving, self._lender
        )

    def close(self) -> None:
        """After all strips."""
        self._device.synchronize()
        self._leaving.clear()
        self._lender.close()


class OnDisk(_Elsewhere):
    """A file that is read and written by threads."""

    def __init__(
        self,
        device: Device,
        staging: Staging,
        count: KvCount,
        make_codec: MakeCodec,
        open_file: Callable[[], KvFile],
        hop: HostBounce,
    ) -> None:
        super().__init__(staging, count, make_codec)
        self._device = device
        self._open_file = open_file
        self._hop = hop
        self.file: KvFile | None = None
        """Opened when something is kept in it."""

    def bytes_of(self, shape: KvShape, capacity: int) -> int:
        return pages(super().bytes_of(shape, capacity))

    def _region(self) -> KvStorage:
        if self.file is None:
            self.file = self._open_file()
        return FileRegion(self.file, self._device, self._hop)

    def close(self) -> None:
        """After all strips."""
        if self.file is not None:
            self.file.close()
        self._hop.close()
