"""The contract of a reader: it reads bytes of files into buffers, in the background."""

from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from ..extent import Extent
from ..handle import Handle


@dataclass(frozen=True, slots=True)
class ReaderStatistics:
    """Counters since the reader was opened."""

    name: str
    """The kind of reader: `threads`, `libaio`, ..."""
    bytes_read: int
    num_reads: int
    is_direct: bool
    """Whether every file so far was opened with O_DIRECT."""


class Reader(Protocol):
    """Reads extents in the background. A blocking read is `submit(...).wait()`."""

    name: str
    alignment: int
    """Bytes: direct reads need offsets, lengths and addresses that are multiples."""

    def submit(
        self, extent: Extent, buffer: memoryview, *, urgent: bool = False
    ) -> Handle:
        """Starts to read `extent` into `buffer`, which is at least as long.

        An extent may end past the end of the file; the buffer's bytes there are then
        undefined. `urgent` reads, which a thread already waits for, go before others.

        The handle raises ReadError for an I/O error and CheckpointChangedError when
        the file is shorter than promised or no longer the one that was opened.
        """

    def statistics(self) -> ReaderStatistics: ...

    def close(self) -> None:
        """Finishes the reads under way, then ends threads and closes files."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
