"""Reads rows from files of columns, Parquet and Arrow, with pyarrow."""

import json
from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from ...io.errors import InputError
from .extras import extra
from .json_rows import checked, columns_of
from .parts import InputRow, Position
from .sources import FileFormat, InputFile

_BATCH_ROWS = 1024


class ColumnFile:
    """A Parquet or Arrow file.

    Rows are decoded one batch at a time, in the thread that asks for them. A batch of
    an Arrow file is at least one record batch as it was written.
    """

    def __init__(self, file: InputFile, any_of: Mapping[str, str]) -> None:
        assert file.path is not None, "standard input has lines"
        self._path, self._format, self._any_of = file.path, file.file_format, any_of
        self._columns = columns_of(any_of)
        self._arrow = extra("pyarrow", "pyarrow", f"reading {file.name}")

    def check(self) -> int | None:
        """The number of rows; None for Arrow, which would have to be read to tell.

        Raises InputError if the file is damaged or lacks the columns that are needed.
        """
        with _damage(self._path, self._arrow):
            num_rows, names = _opened(self._path, self._format)
        if not self._any_of.keys() & set(names):
            wanted = ", nor ".join(self._any_of.values())
            raise InputError(
                f"{self._path} has no column {wanted} (columns: {', '.join(names)})"
            )
        used = [name for name in names if name in self._columns]
        if twice := sorted({name for name in used if used.count(name) > 1}):
            raise InputError(
                f"{self._path} has two columns that are named {twice[0]!r}"
            )
        return num_rows

    def rows(self, number: int, start: int, prefix: str) -> Iterator[InputRow]:
        """The rows from number `start` (from 0) on.

        This file is the job's file `number`. `prefix` is put before row numbers, to
        tell files apart.
        """
        row_number = start
        with _damage(self._path, self._arrow):
            for batch in _batches(self._path, self._format, start, self._columns):
                for values in batch.to_pylist():
                    content = json.dumps(values, default=str).encode()
                    row = {k: v for k, v in values.items() if v is not None}
                    row.pop("error", None)
                    if "id" in row:
                        row["id"] = _plain(row["id"])
                    row_number += 1
                    identity = f"{prefix}{row_number}" if prefix else row_number
                    where = f"{prefix}row {row_number}"
                    yield InputRow(
                        checked(row, where, identity, self._any_of),
                        content,
                        Position(number, row_number, row_number),
                    )


@contextmanager
def _damage(path: Path, arrow: Any) -> Iterator[None]:
    """Turns errors of pyarrow into InputError."""
    try:
        yield
    except InputError:
        raise
    except (arrow.ArrowException, OSError, ValueError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"cannot read {path}: {text}") from error


def _plain(value: Any) -> Any:
    """`value` as an id that JSON can hold: a date, for instance, becomes a string."""
    return value if isinstance(value, (str, int)) else str(value)


def _opened(path: Path, file_format: FileFormat) -> tuple[int | None, list[str]]:
    if file_format == "parquet":
        parquet = extra("pyarrow.parquet", "pyarrow", f"reading {path}")
        with parquet.ParquetFile(path) as file:
            return file.metadata.num_rows, file.schema_arrow.names
    with path.open("rb") as file:
        reader = _ipc(file, path)
        return None, reader.schema.names


def _batches(
    path: Path, file_format: FileFormat, start: int, columns: Collection[str]
) -> Iterator[Any]:
    """Batches of the rows from number `start` on, with those of `columns` that
    exist."""
    with closing(_whole_batches(path, file_format, start, columns)) as batches:
        for first_row, batch in batches:
            skipped = max(start - first_row, 0)
            if skipped < batch.num_rows:
                yield batch.slice(skipped)


def _whole_batches(
    path: Path, file_format: FileFormat, start: int, columns: Collection[str]
) -> Generator[tuple[int, Any], None, None]:
    """Batches, each with the number of its first row.

    The first batch belongs to the row group that contains row `start`; for Arrow, it is
    the first of the file.
    """
    row = 0
    if file_format == "parquet":
        parquet = extra("pyarrow.parquet", "pyarrow", f"reading {path}")
        with parquet.ParquetFile(path) as file:
            names = [n for n in file.schema_arrow.names if n in columns]
            for group in range(file.num_row_groups):
                num_rows = file.metadata.row_group(group).num_rows
                if row + num_rows <= start:
                    row += num_rows
                    continue
                for batch in file.iter_batches(
                    _BATCH_ROWS, row_groups=[group], columns=names, use_threads=False
                ):
                    yield row, batch
                    row += batch.num_rows
        return
    with path.open("rb") as opened:
        reader = _ipc(opened, path)
        names = [n for n in reader.schema.names if n in columns]
        for whole in _record_batches(reader):
            for first in range(0, whole.num_rows, _BATCH_ROWS):
                batch = whole.slice(first, _BATCH_ROWS).select(names)
                yield row, batch
                row += batch.num_rows


def _ipc(file: Any, path: Path) -> Any:
    """A reader of the Arrow file format (Feather version 2) or the streaming format."""
    ipc = extra("pyarrow.ipc", "pyarrow", f"reading {path}")
    magic = file.read(6)
    file.seek(0)
    return ipc.open_file(file) if magic == b"ARROW1" else ipc.open_stream(file)


def _record_batches(reader: Any) -> Iterator[Any]:
    if hasattr(reader, "num_record_batches"):
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)
    else:
        yield from reader
