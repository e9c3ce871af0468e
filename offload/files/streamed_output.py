"""Writes results to standard output, or to a pipe or device."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import BinaryIO

from ...io.closing import Closing
from ...io.errors import OutputError
from .parts import Cut, OutputPart, PartRecord

STDOUT = "-"


def is_stream(output: Path) -> bool:
    """Whether nothing can be kept beside `output`: it is a pipe, a device, or `-`."""
    if str(output) == STDOUT:
        return True
    try:
        kind = output.stat().st_mode
    except (OSError, ValueError):  # there is no such file, or cannot be
        return False
    return not (S_ISREG(kind) or S_ISDIR(kind))


class StreamedOutput(Closing):
    """Writes lines of results as they come.

    Nothing is kept: a job that ends early starts anew. Raises OutputError if `output`
    cannot be written, or if its reader has gone.
    """

    is_kept = False
    is_input_doubtful = False
    redo: frozenset[int] = frozenset()

    def __init__(self, output: Path, cut: Cut) -> None:
        self.cut = cut
        self.done: dict[int, PartRecord] = {}
        self.num_rows = 0
        self.num_errors = 0
        try:
            where = os.dup(1) if str(output) == STDOUT else output
            self._file: BinaryIO = open(where, "wb")  # noqa: SIM115
        except OSError as error:
            raise OutputError(f"cannot write {output}: {error.strerror}") from error

    def known(self, part: OutputPart) -> OutputPart:
        return part

    def write(self, part: OutputPart, lines: Sequence[bytes], num_errors: int) -> None:
        try:
            self._file.writelines(lines)
            self._file.flush()
        except OSError as error:
            raise OutputError(
                f"cannot write the results: {error.strerror}; {self.num_rows} rows "
                "were written"
            ) from error
        self.num_rows += len(lines)
        self.num_errors += num_errors

    def finish(self) -> None:
        pass

    def close(self) -> None:
        with suppress(OSError):  # the failure to write was raised already
            self._file.close()
