"""The host tier: units that are read once and stay in host memory."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from ..checkpoint.header import FileStamp
from ..closing import Closing
from ..memory.arena import Arena, HostMemory
from ..memory.shared import SharedArena
from ..readers.reader import Reader
from .filling import fill, side_by_side
from .layout import Layout
from .loader import Loader


class HostTier(Closing):
    """Holds `units` (numbers into `layouts`) side by side. They are read in parallel
    while this is made; `progress(done_bytes, total_bytes)` is called as they come.

    With `shared`, processes that hold the same units of the same files share one copy,
    which the first of them reads; `version` is that of whatever makes weights of stored
    tensors. Memory that is not shared goes through `prepare` before it is written.
    Raises what reading raises; nothing stays open then.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        units: Sequence[int],
        reader: Reader,
        stamps: Mapping[Path, FileStamp],
        *,
        bounce_bytes: int,
        shared: bool,
        version: str,
        prepare: Callable[[HostMemory], None] = lambda memory: None,
        progress: Callable[[int, int], None],
    ) -> None:
        self._layouts = layouts
        self._reader = reader
        self._bounce_bytes = bounce_bytes
        self._progress = progress
        self.offsets, nbytes = side_by_side({u: layouts[u].nbytes for u in units})
        """Where each unit lies in `memory`."""
        self.memory: HostMemory
        if shared:
            shared_memory = SharedArena(
                f"{version} {self._key(stamps)}", nbytes, self._fill
            )
            self.was_filled_here = shared_memory.was_filled_here
            self.memory = shared_memory
            return
        self.memory = Arena(nbytes)
        self.was_filled_here = True
        try:
            prepare(self.memory)
            self._fill(self.memory)
        except BaseException:
            self.memory.close()
            raise

    def __repr__(self) -> str:
        return f"<HostTier: {len(self.offsets)} units in {self.memory!r}>"

    def load_again(self, units: Iterable[int]) -> None:
        """What is stored of these `units` has changed. Nobody reads them meanwhile."""
        loader = self._loader(self.memory)
        try:
            for unit in units:
                loader.load(unit, self.offsets[unit]).wait()
        finally:
            loader.close()

    def close(self) -> None:
        self.memory.close()

    def _loader(self, memory: HostMemory) -> Loader:
        bounce = self._bounce_bytes
        return Loader(self._layouts, memory, self._reader, bounce_bytes=bounce)

    def _fill(self, memory: HostMemory) -> None:
        loader = self._loader(memory)
        try:
            fill(
                (
                    (self._layouts[unit].nbytes, partial(loader.load, unit, offset))
                    for unit, offset in self.offsets.items()
                ),
                self._progress,
                total_bytes=memory.nbytes,
            )
        finally:
            loader.close()

    def _key(self, stamps: Mapping[Path, FileStamp]) -> str:
        """All that determines what lies where, but the code that puts it there."""
        files = sorted((str(path.resolve()), stamps[path]) for path in stamps)
        units = [
            (plan.name, plan.nbytes, plan.tensors, plan.reads, plan.copies, plan.moves)
            for plan in (self._layouts[unit] for unit in self.offsets)
        ]
        return f"{files} {units}"
