"""Checksums of a checkpoint's tensors, kept in a side file to detect changed bytes."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import xxhash

from ..checkpoint.header import TensorEntry
from ..checkpoint.index import Checkpoint
from ..errors import CheckpointError, OutputError
from ..extent import Extent, align_up, aligned
from ..handle import Handle
from ..memory.arena import Arena
from ..regular_file import MAX_INDEX_BYTES, read_json
from .reader import Reader

SIDE_FILE = "penstock.checksums.json"
ALGORITHM = "xxh3_64"
_BUFFER_BYTES = 32 << 20
_DELETE = "delete it to have it written anew"


def checksums(
    checkpoint: Checkpoint, reader: Reader, progress: Callable[[int, int], None]
) -> dict[str, str]:
    """The xxh3 digest of each tensor's bytes, in hexadecimal, by tensor name.

    Reads all tensors once, and hashes one buffer while the next is read. Calls
    `progress(done_bytes, total_bytes)` after each buffer. Raises what reading raises.
    """
    entries = sorted(checkpoint.entries.values(), key=lambda e: (e.path, e.offset))
    hashes = {entry.name: xxhash.xxh3_64() for entry in entries}
    parts = list(_parts(entries))
    done, total = 0, sum(part.nbytes for _, part in parts)
    size = align_up(_BUFFER_BYTES, reader.alignment) + 2 * reader.alignment
    with Arena(2 * size) as arena:
        buffers = [arena.view(0, size), arena.view(size, size)]

        def start(number: int) -> Handle:
            window = aligned(parts[number][1], reader.alignment)
            return reader.submit(window, buffers[number % 2][: window.nbytes])

        handle = start(0) if parts else None
        try:
            for number, (name, part) in enumerate(parts):
                assert handle is not None, "each part has been started"
                current = handle
                handle = start(number + 1) if number + 1 < len(parts) else None
                current.wait()
                inside = part.offset % reader.alignment
                with buffers[number % 2][inside : inside + part.nbytes] as view:
                    hashes[name].update(view)
                done += part.nbytes
                progress(done, total)
        finally:
            if handle is not None:
                handle.wait_quietly()
            for buffer in buffers:
                buffer.release()
    return {name: digest.hexdigest() for name, digest in hashes.items()}


def _parts(entries: list[TensorEntry]) -> Iterator[tuple[str, Extent]]:
    for entry in entries:
        for start in range(0, entry.nbytes, _BUFFER_BYTES):
            nbytes = min(_BUFFER_BYTES, entry.nbytes - start)
            yield entry.name, Extent(entry.path, entry.offset + start, nbytes)


def write_side_file(path: Path, found: Mapping[str, str]) -> None:
    """Writes the digests `found` (by tensor name) to `path`.

    Raises OutputError if the folder cannot be written to.
    """
    partial = path.with_name(f"{path.name}.partial")
    content = {"algorithm": ALGORITHM, "tensors": dict(found)}
    try:
        partial.write_text(json.dumps(content, indent=1))
        partial.rename(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(
            f"cannot write {path} ({error.strerror}); make its folder writable"
        ) from error


def read_side_file(path: Path) -> dict[str, str]:
    """The digests in the side file `path`, by tensor name.

    Raises CheckpointError if it is not such a file.
    """
    try:
        content = read_json(path, MAX_INDEX_BYTES, fix=_DELETE)
        assert content["algorithm"] == ALGORITHM, "another algorithm"
        tensors = content["tensors"]
        return {str(name): str(digest) for name, digest in tensors.items()}
    except (KeyError, TypeError, AttributeError, AssertionError) as error:
        raise CheckpointError(
            f"{path} holds no checksums of Penstock ({error!r}); {_DELETE}"
        ) from None


def differences(known: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """One sentence for each tensor that differs between `known` and `found` digests."""
    sentences = []
    for name in sorted(known.keys() | found.keys()):
        if name not in found:
            sentences.append(f"tensor {name!r} is gone")
        elif name not in known:
            sentences.append(f"tensor {name!r} is new")
        elif known[name] != found[name]:
            sentences.append(f"tensor {name!r} has other bytes than when it was summed")
    return sentences
