"""Opens the reader that a policy asks for."""

import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from ...io.checkpoint.header import FileStamp
from ...io.readers import libaio_reader as aio
from ...io.readers.aiofiles_reader import AiofilesReader
from ...io.readers.choice import RememberedChoice, choose
from ...io.readers.files import memory_alignment
from ...io.readers.libaio_reader import LibaioReader
from ...io.readers.reader import Reader
from ...io.readers.threads import ThreadReader
from ..policy import IO, cache_fallback, cache_folder

_log = logging.getLogger("penstock")


def open_reader(
    stamps: Mapping[Path, FileStamp], io: IO
) -> tuple[Reader, tuple[str, ...]]:
    """Opens the reader that `io` asks for or, if it is not available, the best one that
    is. Also returns a sentence for each such fallback."""
    makers, missing = makers_of(stamps, io)
    name, fallbacks = choose(
        io.reader,
        makers,
        missing,
        stamps,
        direct=io.direct,
        settings=f"threads {io.threads}, depth {io.depth}, chunk {io.chunk}",
        remembered=RememberedChoice(cache_folder(io) / "readers.json"),
    )
    if (no_cache := cache_fallback(io)) is not None:
        _log.warning(no_cache)
        fallbacks = (*fallbacks, no_cache)
    return makers[name](), fallbacks


def memory_alignment_of(stamps: Mapping[Path, FileStamp], io: IO) -> int:
    """The alignment, in bytes, of the memory that these files are read into."""
    if io.reader == "aiofiles" or not io.direct:
        return 1
    one_of_each_drive = {os.stat(path).st_dev: path for path in stamps}
    return max(map(memory_alignment, one_of_each_drive.values()), default=1)


def makers_of(
    stamps: Mapping[Path, FileStamp], io: IO
) -> tuple[dict[str, Callable[[], Reader]], dict[str, str]]:
    """Functions that open each reader, by name, and for each reader that is not
    available the reason."""
    sizes = {"chunk_bytes": io.chunk}
    makers: dict[str, Callable[[], Reader]] = {
        "libaio": partial(
            LibaioReader, stamps, depth=io.depth, direct=io.direct, **sizes
        ),
        "threads": partial(
            ThreadReader, stamps, num_threads=io.threads, direct=io.direct, **sizes
        ),
        "aiofiles": partial(AiofilesReader, stamps, num_tasks=io.threads, **sizes),
    }
    missing = {"gds": "it reads into the memory of a GPU, and the device is the CPU"}
    if (reason := aio.why_not()) is not None:
        missing["libaio"] = reason
    return makers, missing
