"""The micro-batches of a sweep that have begun and not ended; how they end early."""

from collections.abc import Callable, Iterator

from ..slots.doors import Doors
from .micro_batch import MicroBatch
from .moves import SideTransfers
from .thread_state import ThreadState

# What could not be ended stays suspended: were it to die, it would run once more.
_LEFT_BEHIND: list[MicroBatch] = []


class MicroBatchesInFlight:
    """Those of one hub, whose thread state is `hub_state`."""

    def __init__(
        self, doors: Doors, moves: SideTransfers, hub_state: ThreadState
    ) -> None:
        self.running: MicroBatch | None = None
        """Who has the thread."""
        self._doors = doors
        self._moves = moves
        self._hub_state = hub_state
        self._found: dict[int, MicroBatch] = {}

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self._found.values())

    def __contains__(self, index: int) -> bool:
        return index in self._found

    def add(self, me: MicroBatch) -> None:
        self._found[me.index] = me

    def run(self, me: MicroBatch, piece: Callable[[], None]) -> None:
        """Runs a `piece` of `me`."""
        self.running = me
        try:
            piece()
        finally:
            self.running = None

    def leave(self, me: MicroBatch) -> None:
        """`me` has ended. A failed forward leaves without its hook; nothing stays open
        behind it."""
        self._found.pop(me.index, None)
        self._moves.leave(me)
        while me.inside:
            self._doors.leave(me.inside.pop())

    def end_all(self) -> list[BaseException]:
        """Ends what still waits, under its own state, `finally` and all. Returns what
        interrupted that."""
        errors: list[BaseException] = []
        for me in list(self):
            try:
                self._hub_state.resume()
                self._end(me)
            except BaseException as error:  # the others must end all the same
                errors.append(error)
        return errors

    def let_go(self) -> None:
        """They have nothing of the model any more; called once no door is to be left
        by them. What they hold themselves they have as long as they wait."""
        self._moves.let_go(self._found)
        for me in self:
            me.inside.clear()

    def _end(self, me: MicroBatch) -> None:
        try:
            self._moves.bring_back(me.index)  # its `finally` may look at it
            self.run(me, me.exit)
        finally:
            if me.is_alive:
                _LEFT_BEHIND.append(me)
            self.leave(me)
        if me.error is not None and not isinstance(me.error, Exception):
            raise me.error
