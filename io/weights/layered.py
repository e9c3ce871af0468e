"""A reader of a checkpoint's files and of others that lie over them for a while."""

from pathlib import Path

from ..closing import Closing
from ..extent import Extent
from ..handle import Handle
from ..readers.reader import Reader, ReaderStatistics


class LayeredReader(Closing):
    """Reads what lies in `below`, which stays its owner's, and files that are added,
    each with a reader of its own that is closed when the file is removed."""

    def __init__(self, below: Reader) -> None:
        self._below = below
        self._above: dict[Path, Reader] = {}
        self._bytes_read = 0
        self.name = below.name
        self.alignment = below.alignment

    def __repr__(self) -> str:
        return f"<LayeredReader: {len(self._above)} files over {self._below!r}>"

    def add(self, path: Path, reader: Reader) -> None:
        """What is to be read of `path`, `reader` reads from now on."""
        self._above[path] = reader

    def remove(self, path: Path) -> None:
        """`path` is not read any more."""
        reader = self._above.pop(path)
        self._bytes_read += reader.statistics().bytes_read
        reader.close()

    def submit(
        self, extent: Extent, buffer: memoryview, *, urgent: bool = False
    ) -> Handle:
        """As a reader does."""
        reader = self._above.get(extent.path, self._below)
        return reader.submit(extent, buffer, urgent=urgent)

    def statistics(self) -> ReaderStatistics:
        return self._below.statistics()

    @property
    def bytes_read_above(self) -> int:
        """Bytes of the files that were added."""
        readers = list(self._above.values())
        return self._bytes_read + sum(r.statistics().bytes_read for r in readers)

    def close(self) -> None:
        for path in list(self._above):
            self.remove(path)
