"""When something that was given to a device is done."""

from typing import Protocol


class Event(Protocol):
    """A point in the work of a stream."""

    def wait(self) -> None:
        """Blocks the calling thread until all work before this point is done."""
        ...
