"""The micro-batches of a sweep that have started and not ended."""

from collections.abc import Callable, Iterator

from ..slots.open_sites import OpenSites
from .micro_batch import MicroBatch
from .side_transfers import SideTransfers
from .thread_state import ThreadState

# Micro-batches that could not be ended. A greenlet that is dropped would run once more.
_LEFT_BEHIND: list[MicroBatch] = []


class MicroBatchesInFlight:
    """The micro-batches in flight of one sweep loop, whose thread state is
    `loop_state`."""

    def __init__(
        self,
        open_sites: OpenSites,
        side_transfers: SideTransfers,
        loop_state: ThreadState,
    ) -> None:
        self.running: MicroBatch | None = None
        """The micro-batch that is running; None while the sweep loop runs."""
        self._open_sites = open_sites
        self._side_transfers = side_transfers
        self._loop_state = loop_state
        self._by_index: dict[int, MicroBatch] = {}

    def __len__(self) -> int:
        return len(self._by_index)

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self._by_index.values())

    def __contains__(self, index: int) -> bool:
        return index in self._by_index

    def __getitem__(self, index: int) -> MicroBatch:
        return self._by_index[index]

    def add(self, me: MicroBatch) -> None:
        self._by_index[me.index] = me

    def run(self, me: MicroBatch, piece: Callable[[], None]) -> None:
        """Runs a `piece` of `me`."""
        self.running = me
        try:
            piece()
        finally:
            self.running = None

    def leave(self, me: MicroBatch) -> None:
        """Forgets `me`, which has ended, and leaves the sites that it is still inside:
        a failed forward may skip the hook that does so."""
        self._by_index.pop(me.index, None)
        self._side_transfers.leave(me)
        while me.inside:
            self._open_sites.leave(me.inside.pop())

    def end_all(self) -> list[BaseException]:
        """Ends all micro-batches: each runs its `finally` blocks, under its own thread
        state. Returns the errors and interrupts that came of it."""
        errors: list[BaseException] = []
        for me in list(self):
            try:
                self._loop_state.resume()
                self._end(me)
            except BaseException as error:  # the others must end all the same
                errors.append(error)
        return errors

    def let_go(self) -> None:
        """Detaches all micro-batches from the model: they will not run inside it again.
        The tensors that they refer to live on until their own thread ends them."""
        self._side_transfers.let_go(self._by_index)
        for me in self:
            me.inside.clear()

    def _end(self, me: MicroBatch) -> None:
        try:
            self._side_transfers.bring_back(me.index)  # its `finally` may look at it
            self.run(me, me.exit)
        finally:
            if me.is_alive:
                _LEFT_BEHIND.append(me)
            self.leave(me)
        if me.error is not None and not isinstance(me.error, Exception):
            raise me.error
