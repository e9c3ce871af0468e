"""The micro-batches that wait at each site, in the order in which they came."""

from collections import deque
from collections.abc import Iterable

from .micro_batch import MicroBatch


class Waiting:
    """One queue of suspended micro-batches for each site that is not open."""

    def __init__(self) -> None:
        self._queues: dict[int, deque[MicroBatch]] = {}

    def __bool__(self) -> bool:
        return bool(self._queues)

    def at(self, site: int | None) -> bool:
        """Whether any micro-batch waits at `site`."""
        return site in self._queues

    def add(self, site: int, me: MicroBatch) -> None:
        self._queues.setdefault(site, deque()).append(me)

    def all_at(self, site: int | None) -> Iterable[MicroBatch]:
        """The micro-batches that wait at `site`, in order."""
        return () if site is None else self._queues.get(site, ())

    def first(self, site: int) -> MicroBatch:
        """The first micro-batch in the queue of `site`, which is not empty."""
        return self._queues[site][0]

    def take(self, site: int) -> MicroBatch:
        """Removes and returns the first micro-batch in the queue of `site`."""
        queue = self._queues[site]
        me = queue.popleft()
        if not queue:
            del self._queues[site]
        return me

    def sites(self) -> set[int]:
        """The sites at which micro-batches wait."""
        return set(self._queues)

    def candidates(self) -> set[int]:
        """The sites that may be opened next. A micro-batch that waits inside another
        site keeps that site's units in use, so such sites come first; without any, all
        sites at which micro-batches wait."""
        inner = {
            site
            for site, queue in self._queues.items()
            if any(me.inside for me in queue)
        }
        return inner or self.sites()

    def clear(self) -> None:
        self._queues.clear()
