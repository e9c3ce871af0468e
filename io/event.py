"""The contract of an event: a point in the work of a device."""

from typing import Protocol


class Event(Protocol):
    """A point in the work of a stream; it passes when all work before it is done."""

    def wait(self) -> None:
        """Blocks the calling thread until the event has passed."""
        ...
