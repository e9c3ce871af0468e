"""Tiers of a rank that reads a part of each unit, and gets the rest from others."""

from contextlib import ExitStack
from functools import partial
from typing import Any

from ...io.memory.arena import Arena
from ...io.readers.reader import Reader
from ...io.tier import Tier
from ...io.weights.loader import Loader
from ...scheduler.ranks.post import Post
from ..policy import throttle
from ..ranks.gathered_loads import GatheredLoads
from .tiers import Tiers


class GatheringTiers(Tiers):
    """Tiers whose units come from the files of all ranks of `post`, which is closed
    with them."""

    def __init__(self, post: Post, *args: Any) -> None:
        self._post = post
        super().__init__(*args)

    def _open_disk(self, opened: ExitStack) -> None:
        assert isinstance(self.memory, Arena), "memory of the host"
        self.gathered = gathered = GatheredLoads(
            self._post,
            self._layouts,
            self.drive.reader,
            partial(self._of_gathered, self.memory),
            pace=throttle(self._policy, Tier.DISK),
            record=self._record,
        )
        opened.enter_context(gathered)
        self.loaders.append(gathered.loader)
        self._loads[Tier.DISK] = gathered.load

    def _of_gathered(self, memory: Arena, reader: Reader) -> Loader:
        record = self._record_casts
        return self._loader_of(self._layouts, memory, reader=reader, record=record)

    def _record_casts(
        self, lane: str, name: str, start: float, end: float, nbytes: int = 0
    ) -> None:
        """Records what happens to bytes that are here; their reads are recorded where
        they are read."""
        if lane != Tier.DISK:
            self._record(lane, name, start, end, nbytes)
