"""What every reader can do: bytes of a file into a buffer, in the background."""

from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from ..extent import Extent
from ..handle import Handle


@dataclass(frozen=True, slots=True)
class ReaderStatistics:
    """Counters since the reader was opened."""

    name: str
    """Which reader it is: `threads`, `libaio`, ..."""
    bytes_read: int
    num_reads: int
    is_direct: bool
    """Whether every file so far was opened with O_DIRECT."""
    fallbacks: tuple[str, ...]


class Reader(Protocol):
    """Reads extents in the background. A blocking read is `submit(...).wait()`."""

    name: str
    alignment: int
    """Offsets, lengths and addresses that are multiples of it are read directly."""

    def submit(
        self, extent: Extent, buffer: memoryview, *, urgent: bool = False
    ) -> Handle:
        """Starts reading `extent` into `buffer` (at least as long). A window may end
        past the end of the file; what stands there in the buffer is then undefined.
        What is `urgent` (somebody waits for it already) goes before what is not.

        The handle raises ReadError for an I/O error and CheckpointChangedError when
        the file is shorter than promised or no longer the one that was opened.
        """

    def statistics(self) -> ReaderStatistics: ...

    def close(self) -> None:
        """Finishes what is under way, then frees threads and descriptors."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
