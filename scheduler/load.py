"""A load under way, as the working set sees it."""

from typing import Protocol

from ..io.event import Event


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
