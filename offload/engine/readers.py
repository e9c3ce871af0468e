"""Opens the readers that a policy asks for, and the loops that decode weights."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from ...io.checkpoint.header import FileStamp
from ...io.closing import Closing
from ...io.codecs.kernels import Kernels
from ...io.codecs.opening import open_kernels
from ...io.codecs.tiles import TILES
from ...io.fallbacks import Fallbacks
from ...io.readers import gds
from ...io.readers import libaio_reader as aio
from ...io.readers.aiofiles_reader import AiofilesReader
from ...io.readers.choice import RememberedChoice, choose
from ...io.readers.files import memory_alignment
from ...io.readers.libaio_reader import LibaioReader
from ...io.readers.reader import Reader
from ...io.readers.threads import ThreadReader
from ...io.sharing.ring import Place, RingBrokenError, Seat
from ...io.sharing.shared_reader import SharedReader
from ...io.weights.direct import made_units
from ...io.weights.layered import LayeredReader
from ...io.weights.layout import Layout
from ..policy import IO, cache_fallback, cache_folder


def open_reader(
    stamps: Mapping[Path, FileStamp], io: IO, fallbacks: Fallbacks
) -> Reader:
    """Opens the reader that `io` asks for or, if it is not available, the best one that
    is, which it announces to `fallbacks`."""
    makers, missing = makers_of(stamps, io, fallbacks)
    name = choose(
        io.reader,
        makers,
        missing,
        stamps,
        direct=io.direct,
        settings=f"threads {io.threads}, depth {io.depth}, chunk {io.chunk}",
        remembered=RememberedChoice(cache_folder(io) / "readers.json"),
        fallbacks=fallbacks,
    )
    fallbacks.announce(cache_fallback(io))
    return makers[name]()


class Drive(Closing):
    """The readers of a model's files. `reader` is the one that `io` asks for;
    `layered`, with which units are loaded, can take single files from others. With
    `seat`, processes that have a seat at the same ring share what they read."""

    def __init__(
        self,
        stamps: Mapping[Path, FileStamp],
        io: IO,
        fallbacks: Fallbacks,
        seat: Seat | None = None,
    ) -> None:
        self._shared: SharedReader | None = None
        with ExitStack() as opened:
            self.reader = opened.enter_context(open_reader(stamps, io, fallbacks))
            place = None if seat is None else _place(seat, fallbacks)
            if place is not None:
                opened.enter_context(place)
                shared = SharedReader(self.reader, place, stamps, fallbacks)
                self._shared = opened.enter_context(shared)
            self.layered = LayeredReader(self._shared or self.reader)
            opened.enter_context(self.layered)
            self._opened = opened.pop_all()

    def __repr__(self) -> str:
        return f"<Drive: {self.layered!r}>"

    def loading(self, *, for_all: bool) -> Reader:
        """The reader to load units with; another one if this process alone loads them,
        `for_all` that share what it reads."""
        is_alone = for_all and self._shared is not None
        return self.reader if is_alone else self.layered

    @property
    def bytes_read(self) -> int:
        """Bytes that this process has read itself."""
        return self.reader.statistics().bytes_read + self.layered.bytes_read_above

    @property
    def bytes_shared(self) -> int:
        """Bytes that other processes had read."""
        return 0 if self._shared is None else self._shared.bytes_shared

    def close(self) -> None:
        self._opened.close()


def _place(seat: Seat, fallbacks: Fallbacks) -> Place | None:
    """The place of `seat`; None if its ring cannot be used any more, which is
    announced."""
    try:
        return Place(seat)
    except (RingBrokenError, OSError) as error:
        fallbacks.announce(f"io.read_once: {error}; this process reads all itself")
        return None


def open_gds(
    device: str,
    layouts: Sequence[Layout],
    stamps: Mapping[Path, FileStamp],
    io: IO,
    fallbacks: Fallbacks,
) -> gds.GdsReader | None:
    """Opens the reader that reads straight into the memory of `device`; None where it
    cannot be used. It is announced if some of the units `layouts`, or all, go through
    host memory."""
    largest = max(stamps, key=lambda path: stamps[path].size_bytes)
    made = made_units(layouts)
    whole = len(made) == len(layouts)
    reason = None if whole else gds.why_not(torch.device(device), largest)
    what = "weights"
    if reason is None and made:
        first = layouts[min(made)].name
        reason = f"{first!r} is not stored as it is used (a cast, an assembled part)"
        if not whole:
            what = f"the weights of {len(made)} of {len(layouts)} parts"
    if reason is not None:
        fallbacks.announce(f"no reader 'gds': {reason}; {what} go through host memory")
        if what == "weights":
            return None
    return gds.GdsReader(
        stamps, num_threads=io.threads, chunk_bytes=io.chunk, fallbacks=fallbacks
    )


def memory_alignment_of(stamps: Mapping[Path, FileStamp], io: IO) -> int:
    """The alignment, in bytes, of the memory that these files are read into."""
    if io.reader == "aiofiles" or not io.direct:
        return 1
    one_of_each_drive = {os.stat(path).st_dev: path for path in stamps}
    return max(map(memory_alignment, one_of_each_drive.values()), default=1)


def makers_of(
    stamps: Mapping[Path, FileStamp], io: IO, fallbacks: Fallbacks
) -> tuple[dict[str, Callable[[], Reader]], dict[str, str]]:
    """Functions that open each reader, by name, and for each reader that is not
    available the reason."""
    makers: dict[str, Callable[[], Reader]] = {
        "libaio": partial(
            LibaioReader,
            stamps,
            depth=io.depth,
            chunk_bytes=io.chunk,
            direct=io.direct,
            fallbacks=fallbacks,
        ),
        "threads": partial(
            ThreadReader,
            stamps,
            num_threads=io.threads,
            chunk_bytes=io.chunk,
            direct=io.direct,
            fallbacks=fallbacks,
        ),
        "aiofiles": partial(
            AiofilesReader, stamps, num_tasks=io.threads, chunk_bytes=io.chunk
        ),
    }
    missing = {"gds": "it reads into the memory of a GPU, and the device is the CPU"}
    if (reason := aio.why_not()) is not None:
        missing["libaio"] = reason
    return makers, missing


def kernels_for(layouts: Iterable[Layout], io: IO, fallbacks: Fallbacks) -> Kernels:
    """The kernels for the codecs of `layouts`, if any uses them: see `open_kernels`."""
    if any(plan.uses_kernels for plan in layouts):
        return open_kernels(cache_folder(io), fallbacks, "quantised weights")
    return TILES
