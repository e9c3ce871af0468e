"""The peer tier: units that stay in another device's memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from .arena import Memory
from .device import Device
from .link import Link, LinkLoad
from .transfer import Run, Transfer


class PeerTier:
    """Holds `units` side by side in memory of `device`, laid out as in a slot. They are
    read while this is made, over the link that `open_link(memory, device)` opens;
    `progress(done_bytes, total_bytes)` is called as they come.

    Raises what reading raises; nothing stays open then.
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
        self.offsets: dict[int, int] = {}
        """Where each unit stands in `memory`."""
        nbytes = 0
        for unit in units:
            self.offsets[unit] = nbytes
            nbytes += transfers[unit].nbytes
        self.memory = device.allocate(nbytes)
        try:
            with open_link(self.memory, device) as link:
                self._fill(link, transfers, progress)
        except BaseException:
            self.memory.close()
            raise

    def __repr__(self) -> str:
        return f"<PeerTier: {len(self.offsets)} units on {self.device.name}>"

    def close(self) -> None:
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _fill(
        self,
        link: Link,
        transfers: Mapping[int, Transfer],
        progress: Callable[[int, int], None],
    ) -> None:
        loads: list[LinkLoad] = []
        try:
            for unit, offset in self.offsets.items():
                loads.append(link.load(unit, offset, ()))
            done = 0
            for unit, load in zip(self.offsets, loads, strict=True):
                load.wait()
                done += transfers[unit].nbytes
                progress(done, self.memory.nbytes)
        finally:  # nothing may write into memory that is given back
            for load in loads:
                load.wait_quietly()
            self.device.synchronize()


def whole(transfer: Transfer) -> Transfer:
    """The way of a unit that is laid out as in its slot already: one run."""
    return replace(transfer, runs=(Run(0, 0, transfer.nbytes),))
