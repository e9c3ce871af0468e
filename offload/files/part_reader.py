"""Cuts a job's rows into parts, and skips those that are done."""

from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from itertools import count

import xxhash

from ...io.errors import InputError
from .inputs import Inputs
from .parts import Cut, InputRow, OutputPart, PartRecord, Position


def read_parts(
    inputs: Inputs,
    cut: Cut,
    done: Mapping[int, PartRecord],
    redo: frozenset[int] = frozenset(),
    *,
    is_checked: bool,
) -> Iterator[OutputPart]:
    """The parts that are not in `done`, and those of `done` that are in `redo`, in
    order.

    A part of `done` counts only if it begins where the previous part ends. The other
    parts of `done` are skipped without being read. With `is_checked`, they are read and
    compared with what was read when they were done; those in `redo` always are. Raises
    InputError if they differ, and the errors of reading.
    """
    position, first_row = Position(), 0
    with closing(_Rows(inputs)) as rows:
        for number in count():
            record = done.get(number)
            if record is not None and not record.begins_at(first_row, position):
                record = None
            if record is not None and number not in redo and not is_checked:
                position, first_row = record.end, first_row + record.num_rows
                inputs.rows_read = first_row
                rows.close()
                continue
            part = _read(rows, cut, number, first_row, position)
            if record is not None:
                _check(part, record)
            if part is None:
                return
            position, first_row = part.end, first_row + len(part.rows)
            inputs.rows_read = first_row
            if record is None or number in redo:
                yield part


def check_done(inputs: Inputs, cut: Cut, done: Mapping[int, PartRecord]) -> None:
    """Raises InputError if the rows of `inputs` are not exactly those of the parts
    `done`."""
    for part in read_parts(inputs, cut, done, is_checked=True):
        raise InputError(
            f"row {part.first_row + 1} of the input, and what follows, was not there "
            "when the job was done: name another output, or begin anew with --restart"
        )


class _Rows:
    """Iterates over rows from a given position; keeps the file open between parts."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._rows: Generator[InputRow, None, None] | None = None

    def take(self, start: Position) -> Iterator[InputRow]:
        if self._rows is None:
            self._rows = self._inputs.rows(start)
        return self._rows

    def close(self) -> None:
        rows, self._rows = self._rows, None
        if rows is not None:
            rows.close()


def _read(
    rows: _Rows, cut: Cut, number: int, first_row: int, start: Position
) -> OutputPart | None:
    """The part that begins at `start`; None at the end of the input."""
    found = []
    digest = xxhash.xxh3_64()
    num_bytes = 0
    for row in rows.take(start):
        found.append(row.row)
        digest.update(row.content)
        num_bytes += len(row.content)
        if cut.is_full(len(found), num_bytes):
            break
    if not found:
        return None
    return OutputPart(
        number, first_row, found, row.end, digest.hexdigest(), start=start
    )


def _check(part: OutputPart | None, record: PartRecord) -> None:
    """Raises InputError if `part` is not the part that `record` was made of."""
    is_same = (
        part is not None
        and part.digest == record.input_digest
        and len(part.rows) == record.num_rows
    )
    if not is_same:
        last = record.first_row + record.num_rows
        raise InputError(
            f"rows {record.first_row + 1} to {last} of the input are not those that "
            "were done: give the same input to go on, or --restart to begin anew"
        )
