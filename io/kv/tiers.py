"""The tiers of keys and values: each opens layer buffers of its kind."""

from abc import abstractmethod
from collections.abc import Callable

import torch

from ..closing import Closing
from ..devices.device import Device, Stream
from .buffer_pool import BufferPool
from .codec import Codec
from .copied_buffer import CopiedBuffer
from .count import KvCount
from .file import KvFile, pages
from .file_storage import FileStorage
from .host_bounce import HostBounce
from .in_place_buffer import InPlaceBuffer
from .layer_buffer import KvLayerBuffer, Lease
from .shape import KvShape
from .staging import Staging
from .storage import KvStorage, Leaving, MemoryStorage

PENDING_BYTES = 256 << 20
"""Most bytes that wait to be written at one time."""

MakeCodec = Callable[[KvShape], Codec]


class InPlaceTier(Closing):
    """Keeps keys and values in memory of `device`, where attention reads them."""

    def __init__(self, device: torch.device, count: KvCount) -> None:
        self._device = device
        self._count = count

    def bytes_of(self, shape: KvShape, capacity: int) -> int:
        """Bytes of a layer buffer for `capacity` tokens."""
        return capacity * shape.row_bytes

    def open(self, shape: KvShape, capacity: int, lease: Lease) -> KvLayerBuffer:
        """A new layer buffer for `capacity` tokens, which takes over `lease`."""
        return InPlaceBuffer(shape, capacity, self._device, lease, self._count)

    def close(self) -> None:
        """Does nothing: the memory belongs to the layer buffers."""


class _StoredTier(Closing):
    """Keeps keys and values in a storage, and stages them before attention."""

    def __init__(self, staging: Staging, count: KvCount, make_codec: MakeCodec) -> None:
        self._staging = staging
        self._count = count
        self._make_codec = make_codec

    def bytes_of(self, shape: KvShape, capacity: int) -> int:
        """Bytes of a layer buffer for `capacity` tokens."""
        return capacity * self._make_codec(shape).row_bytes

    def open(self, shape: KvShape, capacity: int, lease: Lease) -> KvLayerBuffer:
        """A new layer buffer for `capacity` tokens, which takes over `lease`."""
        storage = self._new_storage()
        storage.grow(self.bytes_of(shape, capacity))
        return CopiedBuffer(
            shape, self._make_codec, storage, self._staging, lease, self._count
        )

    @abstractmethod
    def _new_storage(self) -> KvStorage: ...


class CopiedTier(_StoredTier):
    """Keeps keys and values in memory of `pool`.

    The stream `out` copies to it, and the stream `back` copies from it.
    """

    def __init__(
        self,
        device: Device,
        staging: Staging,
        count: KvCount,
        make_codec: MakeCodec,
        *,
        out: Stream,
        back: Stream,
        pool: BufferPool,
    ) -> None:
        super().__init__(staging, count, make_codec)
        self._device = device
        self._out = out
        self._back = back
        self._pool = pool
        self._leaving = Leaving(device)

    def _new_storage(self) -> KvStorage:
        return MemoryStorage(
            self._device, self._out, self._back, self._leaving, self._pool
        )

    def close(self) -> None:
        """Call it after all layer buffers are closed."""
        self._device.synchronize()
        self._leaving.clear()
        self._pool.close()


class DiskTier(_StoredTier):
    """Keeps keys and values in a file that threads read and write."""

    def __init__(
        self,
        device: Device,
        staging: Staging,
        count: KvCount,
        make_codec: MakeCodec,
        open_file: Callable[[], KvFile],
        bounce: HostBounce,
    ) -> None:
        super().__init__(staging, count, make_codec)
        self._device = device
        self._open_file = open_file
        self._bounce = bounce
        self.file: KvFile | None = None
        """None until the first layer buffer is opened."""

    def bytes_of(self, shape: KvShape, capacity: int) -> int:
        return pages(super().bytes_of(shape, capacity))

    def _new_storage(self) -> KvStorage:
        if self.file is None:
            self.file = self._open_file()
        return FileStorage(self.file, self._device, self._bounce)

    def close(self) -> None:
        """Call it after all layer buffers are closed."""
        if self.file is not None:
            self.file.close()
        self._bounce.close()
