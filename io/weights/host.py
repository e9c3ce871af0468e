"""The host tier: units are read once and stay in host memory."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import torch

from ..checkpoint.header import FileStamp
from ..closing import Closing
from ..codecs.kernels import Kernels
from ..devices.device import CpuDevice
from ..memory.arena import Arena, HostMemory, Memory
from ..memory.shared import SharedArena
from .filling import fill, grown_bytes, side_by_side
from .layout import Layout, Placed
from .loader import Loader
from .source import ResidentSource
from .transfer import Transfer
from .unpacking import Image, Unpacker


class HostTier(Closing):
    """Holds `units` (indices into `layouts`) one behind the other in host memory.

    The constructor reads them all by a loader into that memory, in parallel, and calls
    `progress(done_bytes, total_bytes)` after each.

    With `shared`, processes that hold the same units of the same files share one copy,
    which the first process reads. `version` identifies the code that makes parameters
    from stored tensors; only processes of one version share. Without `shared`,
    `prepare` is called with the memory before anything is written to it.

    Raises the errors of the reads, and closes everything first.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        units: Sequence[int],
        loader_into: Callable[[HostMemory], Loader],
        stamps: Mapping[Path, FileStamp],
        *,
        shared: bool,
        version: str,
        prepare: Callable[[HostMemory], None] = lambda memory: None,
        progress: Callable[[int, int], None],
    ) -> None:
        self._layouts = layouts
        self._loader_into = loader_into
        self._progress = progress
        self.moved: dict[int, Memory] = {}
        """Units that have grown since, in memory of their own."""
        self._rooms = {unit: layouts[unit].nbytes for unit in units}
        self.offsets, nbytes = side_by_side({u: layouts[u].nbytes for u in units})
        """The offset of each unit in `memory`, in bytes."""
        self.memory: HostMemory
        if shared:
            shared_memory = SharedArena(
                f"{version} {self._key(stamps)}", nbytes, self._fill
            )
            self.was_filled_here = shared_memory.was_filled_here
            self.memory = shared_memory
            return
        self.memory = Arena(nbytes)
        self.was_filled_here = True
        try:
            prepare(self.memory)
            self._fill(self.memory)
        except BaseException:
            self.memory.close()
            raise

    def __repr__(self) -> str:
        return f"<HostTier: {len(self.offsets)} units in {self.memory!r}>"

    def nbytes_with(self, sizes: Mapping[int, int]) -> int:
        """The bytes that this tier takes once those of its units that are among `sizes`
        have so many."""
        there = {unit: memory.nbytes for unit, memory in self.moved.items()}
        there.update((u, size) for u, size in sizes.items() if u in self.offsets)
        return grown_bytes(self.memory.nbytes, self._rooms, there)

    def loader(self) -> Loader:
        """A loader into this memory, for a unit that gets another's place."""
        return self._loader_into(self.memory)

    def has_room_for(self, new: int, old: int) -> bool:
        """Whether the unit `new` fits into the place of `old`."""
        is_there = old not in self.moved and new not in self.offsets
        return is_there and self._layouts[new].nbytes <= self._rooms[old]

    def give_place(self, old: int, new: int) -> None:
        """Gives the place of the unit `old` to `new`, which is to be read into it."""
        self.offsets[new] = self.offsets.pop(old)
        self._rooms[new] = self._rooms.pop(old)

    def load_again(self, units: Sequence[int]) -> None:
        """Reads `units` again after their files changed.

        Nobody may use these units meanwhile.
        """
        if not units:
            return
        with closing(self._loader_into(self.memory)) as loader:
            for unit in units:
                nbytes = self._layouts[unit].nbytes
                if (own := self.moved.pop(unit, None)) is not None:
                    own.close()
                if nbytes <= self._rooms[unit]:
                    loader.load(unit, self.offsets[unit]).wait()
                    continue
                self.moved[unit] = memory = Arena(nbytes)
                with closing(self._loader_into(memory)) as own_loader:
                    own_loader.load(unit, 0).wait()

    def close(self) -> None:
        for memory in (*self.moved.values(), self.memory):
            memory.close()

    def _fill(self, memory: HostMemory) -> None:
        loader = self._loader_into(memory)
        try:
            fill(
                (
                    (self._layouts[unit].nbytes, partial(loader.load, unit, offset))
                    for unit, offset in self.offsets.items()
                ),
                self._progress,
                total_bytes=memory.nbytes,
            )
        finally:
            loader.close()

    def _key(self, stamps: Mapping[Path, FileStamp]) -> str:
        """All that determines the bytes of the memory, except the code version."""
        files = sorted((str(path.resolve()), stamps[path]) for path in stamps)
        units = [
            (
                *(plan.name, plan.nbytes, plan.tensors, plan.reads, plan.chains),
                *((each.codec.identity, each) for each in plan.decodes),
            )
            for plan in (self._layouts[unit] for unit in self.offsets)
        ]
        return f"{files} {units}"


class HostParameters(Closing):
    """The parameters of units of the tier `host`, for the CPU to compute with.

    Those of a unit are views of the tier where they lie there as they are computed
    with. Else they are made in a buffer, as `transfers` make slots: decoded, and put
    together. `layouts` are the units as the tier holds them. For one thread at a time.
    """

    def __init__(
        self,
        host: HostTier,
        layouts: Sequence[Layout],
        transfers: Mapping[int, Transfer],
        kernels: Kernels,
    ) -> None:
        self._source = ResidentSource(host.memory, host.offsets, host.moved)
        self._layouts = layouts
        self._transfers = transfers
        self._kernels = kernels
        self._buffer: Arena | None = None

    def of(self, unit: int) -> dict[str, torch.Tensor]:
        """The parameters of `unit` by name, in their own shapes and dtypes, until the
        next call."""
        memory, start = self._source.get(unit)
        transfer, placed = self._transfers[unit], self._layouts[unit].tensors
        if not placed or any(tensor.fragments for tensor in placed):
            image = Image(memory, start, self._source.cut)
            memory, start, placed = self._room(transfer.nbytes), 0, transfer.tensors
            copies = CpuDevice().compute
            with Unpacker(CpuDevice(), memory, copies, self._kernels) as unpacker:
                unpacker.fill(transfer, image, start)
        with torch.inference_mode(False):
            return {each.name: _viewed(each, memory, start) for each in placed}

    def close(self) -> None:
        if self._buffer is not None:
            self._buffer.close()

    def _room(self, nbytes: int) -> Memory:
        if self._buffer is None or self._buffer.nbytes < nbytes:
            self.close()
            self._buffer = Arena(nbytes)
        return self._buffer


def _viewed(placed: Placed, memory: Memory, start: int) -> torch.Tensor:
    numel = torch.Size(placed.shape).numel()
    if not numel:
        return torch.empty(placed.shape, dtype=placed.dtype, device="cpu")
    stored = memory.tensor(start + placed.offset, numel * placed.dtype.itemsize)
    return stored.view(placed.dtype).view(placed.shape)
