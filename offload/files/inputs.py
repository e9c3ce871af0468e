"""Reads the rows of a job from its files, one after the other."""

import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import chain
from pathlib import Path

from ...io.errors import InputError
from .columns import ColumnFile
from .compression import CHUNK_BYTES, decompressed
from .csv_rows import csv_header, csv_records
from .fingerprint import fingerprint
from .json_array import array_records
from .json_rows import (
    RowRecord,
    checked,
    line_records,
    parse_row,
    split_lines,
    text_row,
)
from .parts import InputRow, Position
from .sources import InputFile

_STDIN = 0


class Inputs:
    """The rows of `files`, read lazily and in order.

    A row without "id" gets its line (or row) number, from 1, as id. If there are
    several files, the file's name is put before it.
    """

    def __init__(
        self,
        files: Sequence[InputFile],
        any_of: Mapping[str, str],
        *,
        stdin: int | None = None,
    ) -> None:
        self.files = tuple(files)
        self._any_of = any_of
        self._stdin = _STDIN if stdin is None else stdin
        self._stats = [_stat(file) for file in files]
        self._sizes = [size for size, _ in self._stats]
        self._read_bytes = 0
        """How far the current file is read, in bytes as stored."""
        self._file = 0
        self.rows_read = 0
        """How many rows are read. The reader sets it."""
        self._is_array: set[int] = set()
        """The indices of the files that hold a JSON array."""
        self._columns: dict[int, Sequence[str]] = {}
        """The names of the columns of CSV files, by the file's index."""
        self._num_rows = [self._check(number) for number in range(len(files))]

    @property
    def is_stream(self) -> bool:
        """Whether rows come from standard input, which is read once and has no known
        length."""
        return self.files[0].path is None

    @property
    def num_rows(self) -> int | None:
        """The number of rows of all files; None if a file does not tell."""
        known = [num for num in self._num_rows if num is not None]
        return sum(known) if len(known) == len(self.files) else None

    def estimated_rows(self) -> float | None:
        """The number of rows of all files, estimated from those that were read.

        None for standard input, and before anything was read.
        """
        if self.num_rows is not None:
            return self.num_rows
        done = sum(self._sizes[: self._file]) + self._read_bytes
        if self.is_stream or not done:
            return None
        return max(self.rows_read * sum(self._sizes) / done, self.rows_read)

    def identity(self) -> dict[str, dict[str, int | str]]:
        """Identifies these files: the place in the order, size (bytes) and fingerprint
        of each, by name.

        A single file is named without its folder, which does not matter then.
        """
        found: dict[str, dict[str, int | str]] = {}
        for number, file in enumerate(self.files):
            if file.path is None:
                found[file.name] = {}
                continue
            with _reading(file.path):
                mark = fingerprint(file.path)
            name = file.name if len(self.files) > 1 else file.path.name
            found[name if name not in found else f"{name} ({number + 1})"] = {
                "place": number + 1,
                "bytes": self._sizes[number],
                "fingerprint": mark,
            }
        return found

    def stamps(self) -> list[int]:
        """The time of the last change of each file, in nanoseconds; 0 for standard
        input."""
        return [modified for _, modified in self._stats]

    def rows(self, start: Position) -> Generator[InputRow, None, None]:
        """All rows from `start` on.

        Raises InputError if a file cannot be read or was changed meanwhile. A file that
        is removed meanwhile is still read to its end.
        """
        for number in range(start.file, len(self.files)):
            begin = start if number == start.file else Position(number)
            self._file, self._read_bytes = number, 0
            with closing(self._rows_of(begin)) as rows:
                yield from rows
        self._file, self._read_bytes = len(self.files), 0

    def _rows_of(self, start: Position) -> Generator[InputRow, None, None]:
        file = self.files[start.file]
        several = len(self.files) > 1
        prefix = f"{file.name}:" if several else ""
        if file.file_format not in ("parquet", "arrow"):
            yield from self._records_of(file, start, prefix)
            return
        unchanged = self._watch(lambda: os.stat(file.path or ""), start.file)
        unchanged()
        total = self._num_rows[start.file]
        for row in ColumnFile(file, self._any_of).rows(
            start.file, start.offset, prefix
        ):
            if row.end.row % 1024 == 0:
                unchanged()
            if total:
                self._read_bytes = self._sizes[start.file] * row.end.row // total
            yield row

    def _records_of(
        self, file: InputFile, start: Position, prefix: str
    ) -> Iterator[InputRow]:
        offset, number = start.offset, start.row
        with closing(self._chunks(start.file, offset)) as chunks:
            for record in self._records(chunks, start):
                offset += record.num_bytes
                number += record.num_lines
                if not file.compression:
                    self._read_bytes = offset
                what = "row" if start.file in self._is_array else "line"
                where = f"{prefix}{number}" if prefix else f"{what} {number}"
                identity = f"{prefix}{number}" if prefix else number
                row = checked(record.parse(where), where, identity, self._any_of)
                end = Position(start.file, offset, number)
                yield InputRow(row, record.content, end)

    def _records(self, chunks: Iterator[bytes], start: Position) -> Iterator[RowRecord]:
        """The rows in `chunks`, the bytes of a file from `start` on."""
        file = self.files[start.file]
        is_begun = start.offset > 0
        if start.file in self._columns:
            columns = self._columns[start.file]
            return csv_records(chunks, columns, file.name, is_begun=is_begun)
        if start.file in self._is_array:
            return array_records(chunks, file.name, is_begun=is_begun)
        parse = text_row if file.file_format == "text" else parse_row
        return line_records(split_lines(chunks, file.name), parse)

    def _chunks(self, number: int, start: int) -> Generator[bytes, None, None]:
        """The decompressed bytes of file `number` from offset `start` on."""
        file = self.files[number]
        if file.path is None:
            with closing(self._stdin_chunks()) as chunks:
                yield from _after(start, chunks)
            return
        with _reading(file.path), file.path.open("rb", buffering=0) as opened:
            descriptor = opened.fileno()
            unchanged = self._watch(lambda: os.fstat(descriptor), number)
            unchanged()
            if not file.compression:
                opened.seek(start)
                start = 0

            def raw() -> Iterator[bytes]:
                while chunk := opened.read(CHUNK_BYTES):
                    if file.compression:
                        self._read_bytes = opened.tell()
                    yield chunk
                    unchanged()

            yield from _after(start, decompressed(raw(), file.compression, file.name))
            unchanged()

    def _stdin_chunks(self) -> Generator[bytes, None, None]:
        while chunk := os.read(self._stdin, CHUNK_BYTES):
            yield chunk

    def _watch(
        self, stat: Callable[[], os.stat_result], number: int
    ) -> Callable[[], None]:
        """A function that raises InputError if file `number` has changed since the job
        began."""

        def unchanged() -> None:
            try:
                now = stat()
            except FileNotFoundError:
                return  # a file that is open stays readable
            if (now.st_size, now.st_mtime_ns) != self._stats[number]:
                raise InputError(
                    f"{self.files[number].name} was changed while it was read: put it "
                    "back as it was and run again, or begin anew with --restart"
                )

        return unchanged

    def _check(self, number: int) -> int | None:
        """Checks that file `number` can be read and is what its name says. Returns the
        number of its rows, or None if it is not known."""
        file = self.files[number]
        if file.path is None:
            return None
        with _reading(file.path), file.path.open("rb"):
            pass
        if file.file_format in ("parquet", "arrow"):
            return ColumnFile(file, self._any_of).check()
        if file.file_format in ("csv", "json"):
            with closing(self._chunks(number, 0)) as chunks:
                if file.file_format == "csv":
                    names = csv_header(chunks, self._any_of, file.name)
                    self._columns[number] = names
                elif _is_array(chunks, file.name):
                    self._is_array.add(number)
        return None


def _is_array(chunks: Iterator[bytes], name: str) -> bool:
    """Whether a .json file holds an array; otherwise each line must hold an object.
    Raises InputError if neither is the case."""
    begin = next((chunk for chunk in chunks if chunk.strip()), b"")
    if begin.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        return True
    lines = (line for line in split_lines(chain([begin], chunks), name) if line.strip())
    first = next(lines, b"").strip()
    if first == b"{" or (
        first and "error" in parse_row(first, "") and next(lines, b"")
    ):
        raise InputError(
            f"{name} is not an array of JSON objects, and its first line is not an "
            "object by itself: give an array, or an object a line"
        )
    return False


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns an OSError of the file `path` into InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _after(start: int, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """`chunks` without their first `start` bytes."""
    for chunk in chunks:
        if start < len(chunk):
            yield chunk[start:] if start else chunk
        start = max(start - len(chunk), 0)


def _stat(file: InputFile) -> tuple[int, int]:
    """The size in bytes and the time of the last change in nanoseconds; (0, 0) for
    standard input."""
    if file.path is None:
        return 0, 0
    with _reading(file.path):
        found = file.path.stat()
    return found.st_size, found.st_mtime_ns
