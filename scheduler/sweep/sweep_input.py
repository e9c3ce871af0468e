"""The batches that a sweep has to run, and how many it has run. Pure."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import length_hint
from typing import Any


def _ended(batch: Any) -> Any:
    raise AssertionError("a sweep that has ended starts nothing")


@dataclass
class SweepInput:
    """The function to call with each batch, and the batches that are left."""

    fn: Callable[[Any], Any]
    batches: Iterable[Any]
    has_more: bool = True
    """False once `batches` is exhausted."""
    num_taken: int = 0

    def __post_init__(self) -> None:
        self._left = iter(self.batches)

    @property
    def expects_more(self) -> bool:
        """Whether another batch is likely. The end of a list is known beforehand, that
        of a generator only once it is reached."""
        return self.has_more and length_hint(self._left, 1) > 0

    def take(self) -> tuple[int, Any]:
        """Returns the number of the next batch, and the batch. Raises StopIteration at
        the end."""
        try:
            batch = next(self._left)
        except StopIteration:
            self.has_more = False
            raise
        self.num_taken += 1
        return self.num_taken - 1, batch

    def let_go(self) -> None:
        """Drops the function and the batches. The sweep that has ended is part of
        reference cycles, which would keep them until the garbage collector runs."""
        self.fn, self.batches, self._left = _ended, (), iter(())


@dataclass(slots=True)
class SweepProgress:
    """Counts micro-batches."""

    num_started: int = 0
    num_finished: int = 0
    max_in_flight: int = 0

    def start(self, num_in_flight: int) -> None:
        """One more has started: `num_in_flight` are in flight now."""
        self.num_started += 1
        self.max_in_flight = max(self.max_in_flight, num_in_flight)
