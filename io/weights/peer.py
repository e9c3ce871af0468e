"""The peer tier: units stay in the memory of another device."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from ..closing import Closing
from ..devices.device import Device
from ..memory.arena import Memory
from .filling import fill, grown_bytes, side_by_side
from .link import Link
from .transfer import Transfer


class PeerTier(Closing):
    """Holds `units` one behind the other in memory of `device`, laid out as in a slot.

    The constructor reads them all over the link that `open_link(memory, device)` opens,
    and calls `progress(done_bytes, total_bytes)` after each.

    Raises the errors of the reads, and closes everything first.
    """

    def __init__(
        self,
        transfers: Mapping[int, Transfer],
        units: Sequence[int],
        device: Device,
        *,
        open_link: Callable[[Memory, Device], Link],
        progress: Callable[[int, int], None],
    ) -> None:
        self.device = device
        self.moved: dict[int, Memory] = {}
        """Units that have grown since, in memory of their own."""
        self._transfers = transfers
        self._rooms = {unit: transfers[unit].nbytes for unit in units}
        self.offsets, nbytes = side_by_side({u: transfers[u].nbytes for u in units})
        """The offset of each unit in `memory`, in bytes."""
        self.memory = device.allocate(nbytes)
        try:
            with open_link(self.memory, device) as link:
                fill(
                    (
                        (transfers[unit].nbytes, partial(link.load, unit, offset, ()))
                        for unit, offset in self.offsets.items()
                    ),
                    progress,
                    total_bytes=nbytes,
                )
                device.synchronize()
        except BaseException:
            self.memory.close()
            raise

    def __repr__(self) -> str:
        return f"<PeerTier: {len(self.offsets)} units on {self.device.name}>"

    def nbytes_with(self, sizes: Mapping[int, int]) -> int:
        """The bytes that this tier takes once those of its units that are among `sizes`
        have so many."""
        there = {unit: memory.nbytes for unit, memory in self.moved.items()}
        there.update((u, size) for u, size in sizes.items() if u in self.offsets)
        return grown_bytes(self.memory.nbytes, self._rooms, there)

    def load_again(
        self, units: Sequence[int], open_link: Callable[[Memory, Device], Link]
    ) -> None:
        """Reads `units` again after their files changed.

        Nobody may use these units meanwhile.
        """
        grown = {u for u in units if self._transfers[u].nbytes > self._rooms[u]}
        for unit in units:
            if (own := self.moved.pop(unit, None)) is not None:
                own.close()
        if kept := [unit for unit in units if unit not in grown]:
            with open_link(self.memory, self.device) as link:
                for unit in kept:
                    link.load(unit, self.offsets[unit], ()).wait()
                self.device.synchronize()
        for unit in grown:
            memory = self.device.allocate(self._transfers[unit].nbytes)
            self.moved[unit] = memory
            with open_link(memory, self.device) as link:
                link.load(unit, 0, ()).wait()
                self.device.synchronize()

    def close(self) -> None:
        for memory in (*self.moved.values(), self.memory):
            memory.close()
