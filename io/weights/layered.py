"""A reader that can take single files from other readers for a while."""

from pathlib import Path

from ..closing import Closing
from ..extent import Extent
from ..handle import Handle
from ..readers.reader import Reader, ReaderStatistics


class LayeredReader(Closing):
    """Reads files with `below`, and each added file with the reader given for it.

    The reader of an added file is closed when the file is removed. `below` is not
    closed here: it stays with its owner.
    """

    def __init__(self, below: Reader) -> None:
        self._below = below
        self._above: dict[Path, Reader] = {}
        self._bytes_read = 0
        self.name = below.name
        self.alignment = below.alignment

    def __repr__(self) -> str:
        return f"<LayeredReader: {len(self._above)} files over {self._below!r}>"

    def add(self, path: Path, reader: Reader) -> None:
        """From now on, `reader` does all reads of `path`."""
        self._above[path] = reader

    def remove(self, path: Path) -> None:
        """Ends the use of `path` and closes its reader."""
        reader = self._above.pop(path)
        self._bytes_read += reader.statistics().bytes_read
        reader.close()

    def submit(
        self, extent: Extent, buffer: memoryview, *, urgent: bool = False
    ) -> Handle:
        """Starts to read `extent` into `buffer`; see `Reader.submit`."""
        reader = self._above.get(extent.path, self._below)
        return reader.submit(extent, buffer, urgent=urgent)

    def statistics(self) -> ReaderStatistics:
        return self._below.statistics()

    @property
    def bytes_read_above(self) -> int:
        """Bytes that were read from added files."""
        readers = list(self._above.values())
        return self._bytes_read + sum(r.statistics().bytes_read for r in readers)

    def close(self) -> None:
        for path in list(self._above):
            self.remove(path)
