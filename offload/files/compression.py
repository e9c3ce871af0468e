"""The bytes of a file that may be compressed."""

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ...io.errors import InputError
from .extras import extra
from .sources import Codec

# Compressed bytes that are looked at in one go: they may become a thousand times more.
CHUNK_BYTES = 64 << 10


def decompressed(chunks: Iterable[bytes], codec: Codec, name: str) -> Iterator[bytes]:
    """What `chunks` of the file `name` hold. Raises InputError where it is damaged or
    cut off, after all that could be had before."""
    if codec == "":
        return iter(chunks)
    if codec == "gz":
        return _decompressed(chunks, lambda: zlib.decompressobj(31), name, zlib.error)
    zstandard = extra("zstandard", "zstandard", f"reading {name}")
    return _decompressed(
        chunks,
        lambda: zstandard.ZstdDecompressor().decompressobj(),
        name,
        zstandard.ZstdError,
    )


def _decompressed(
    chunks: Iterable[bytes],
    make: Callable[[], Any],
    name: str,
    damage: type[Exception],
) -> Iterator[bytes]:
    """Member after member (gzip) or frame after frame (zstd), as `cat` puts them."""
    member = None
    for chunk in chunks:
        while chunk:
            member = member or make()
            try:
                found = member.decompress(chunk)
            except damage as error:
                raise InputError(f"{name} is damaged: {error}") from error
            if found:
                yield found
            chunk = member.unused_data if member.eof else b""
            if member.eof:
                member = None
    if member is not None:
        raise InputError(f"{name} is cut off: its end is missing; copy it again")
