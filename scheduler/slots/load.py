"""A load under way, and a loaded unit, as the working set sees them."""

from dataclasses import dataclass
from typing import Protocol

from ...io.event import Event
from .arena_map import Slot


class Load(Protocol):
    """The transfer of one unit into a slot, under way or finished."""

    @property
    def ready(self) -> Event | None:
        """The event after all work that this load queued on a device; None if it
        queued none."""
        ...

    def wait(self) -> None:
        """Waits until work that reads the unit may be queued. Raises the error of a
        load that failed."""
        ...

    def wait_quietly(self) -> None:
        """Waits until the load is finished or queued before `ready`. Never raises the
        error of a load that failed."""
        ...


@dataclass(slots=True)
class Held:
    """A unit that has a slot."""

    slot: Slot
    load: Load
    wanted_at: int
    """The number of the last `prefetch` that named this unit."""
    users: int = 0
    was_read: bool = False
    released_at: int = 0
    last_read: Event | None = None
    """The event after the device work that the last reader queued."""
