"""The contract of a load: one unit on its way into memory."""

from typing import Protocol

from ..event import Event


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
