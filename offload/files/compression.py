"""Reads the bytes of a file that may be compressed."""

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ...io.errors import InputError
from .extras import extra
from .sources import Compression

CHUNK_BYTES = 64 << 10
"""Bytes that are read from a file at once."""
# Compressed bytes that are decompressed at once. Gzip expands at most a thousand times;
# zstd makes a block of up to 128 KiB from four bytes.
_GZIP_BYTES = CHUNK_BYTES
_ZSTD_BYTES = 1 << 10
_MOST_WINDOW_BYTES = 128 << 20  # the zstd command's own limit


def decompressed(
    chunks: Iterable[bytes], compression: Compression, name: str
) -> Iterator[bytes]:
    """The decompressed content of `chunks`, bytes of the file `name`.

    Raises InputError if the file is damaged or cut off, after all content that could be
    read before.
    """
    if compression == "":
        return iter(chunks)
    if compression == "gz":
        pieces = _pieces(chunks, _GZIP_BYTES)
        return _decompressed(pieces, lambda: zlib.decompressobj(31), name, zlib.error)
    zstandard = extra("zstandard", "zstandard", f"reading {name}")
    made = zstandard.ZstdDecompressor(max_window_size=_MOST_WINDOW_BYTES)
    pieces = _pieces(chunks, _ZSTD_BYTES)
    return _decompressed(pieces, made.decompressobj, name, zstandard.ZstdError)


def _pieces(chunks: Iterable[bytes], nbytes: int) -> Iterator[bytes]:
    for chunk in chunks:
        for start in range(0, len(chunk), nbytes):
            yield chunk[start : start + nbytes]


def _decompressed(
    chunks: Iterable[bytes],
    make: Callable[[], Any],
    name: str,
    damage: type[Exception],
) -> Iterator[bytes]:
    """Decompresses all members (gzip) or frames (zstd), which may follow one
    another."""
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
