"""Checks a checkpoint on disk against a file of checksums beside it."""

from dataclasses import dataclass
from pathlib import Path

from ...io.fallbacks import Fallbacks
from ...io.readers.checksums import (
    SIDE_FILE,
    checksums,
    differences,
    read_side_file,
    write_side_file,
)
from ..configs.opening import open_model
from ..monitoring.progress import FillProgress
from ..policy import Policy
from .readers import open_reader


@dataclass(frozen=True, slots=True)
class Integrity:
    """The result of `verify_checksums`."""

    side_file: Path
    was_written: bool
    """Whether there was no file of checksums, and it was written now."""
    num_tensors: int
    differences: tuple[str, ...]


def verify_checksums(path: str | Path, policy: Policy | None = None) -> Integrity:
    """Computes the checksum of every tensor of the checkpoint in `path`, and compares
    it with the file of checksums beside it, which is written if there is none.

    Raises CheckpointError for a checkpoint or side file that cannot be read,
    OutputError where the side file cannot be written, ReadError from the device.
    """
    checkpoint = open_model(path)
    side_file = checkpoint.folder / SIDE_FILE
    known = read_side_file(side_file) if side_file.exists() else None
    io = (policy or Policy()).io
    reader = open_reader(checkpoint.stamps, io, Fallbacks())
    with reader, FillProgress("summing the checkpoint") as progress:
        sums = checksums(checkpoint, reader, progress)
    if known is None:
        write_side_file(side_file, sums)
    return Integrity(
        side_file,
        known is None,
        len(sums),
        () if known is None else tuple(differences(known, sums)),
    )
