"""The peer tier: units stay in the memory of another device."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from ..closing import Closing
from ..devices.device import Device
from ..memory.arena import Memory
from .filling import fill, side_by_side
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

    def load_again(
        self, units: Sequence[int], open_link: Callable[[Memory, Device], Link]
    ) -> None:
        """Reads `units` again after their files changed.

        Nobody may use these units meanwhile.
        """
        if not units:
            return
        with open_link(self.memory, self.device) as link:
            for unit in units:
                link.load(unit, self.offsets[unit], ()).wait()
            self.device.synchronize()

    def close(self) -> None:
        self.memory.close()
