"""Who waits at which site, first come first served."""

from collections import deque
from collections.abc import Iterable

from .micro_batch import MicroBatch


class Waiting:
    """The micro-batches that wait, by the site at whose door they do."""

    def __init__(self) -> None:
        self._queues: dict[int, deque[MicroBatch]] = {}

    def __bool__(self) -> bool:
        return bool(self._queues)

    def at(self, site: int | None) -> bool:
        """Whether anybody waits at `site`."""
        return site in self._queues

    def add(self, site: int, me: MicroBatch) -> None:
        self._queues.setdefault(site, deque()).append(me)

    def all_at(self, site: int | None) -> Iterable[MicroBatch]:
        """Those that wait at `site`, in the order of their turns."""
        return () if site is None else self._queues.get(site, ())

    def first(self, site: int) -> MicroBatch:
        """Whose turn it is at `site`, where somebody waits."""
        return self._queues[site][0]

    def take(self, site: int) -> MicroBatch:
        """Whose turn it is at `site`, who waits no longer."""
        queue = self._queues[site]
        me = queue.popleft()
        if not queue:
            del self._queues[site]
        return me

    def sites(self) -> set[int]:
        """The sites where somebody waits."""
        return set(self._queues)

    def candidates(self) -> set[int]:
        """The sites that come into question next: those where somebody waits inside of
        another site, whose units stay in use meanwhile, else all."""
        inner = {
            site
            for site, queue in self._queues.items()
            if any(me.inside for me in queue)
        }
        return inner or self.sites()

    def clear(self) -> None:
        self._queues.clear()
