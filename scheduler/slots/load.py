"""A load under way, and the unit that it brought, as the working set sees them."""

from dataclasses import dataclass
from typing import Protocol

from ...io.event import Event
from .arena_map import Slot


class Load(Protocol):
    """A load under way into a slot."""

    @property
    def ready(self) -> Event | None:
        """When all that it has queued on a device is done; None if there is none."""
        ...

    def wait(self) -> None:
        """Waits until work on the unit can be given; raises what failed."""
        ...

    def wait_quietly(self) -> None:
        """Waits until all that it does is done, or queued before `ready`."""
        ...


@dataclass(slots=True)
class Held:
    """A unit that has a slot."""

    slot: Slot
    load: Load
    wanted_at: int
    """The `prefetch` that expected it last."""
    users: int = 0
    was_read: bool = False
    released_at: int = 0
    last_read: Event | None = None
    """The end of the device's work that its last reader had queued."""
