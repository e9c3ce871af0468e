"""Cuts a job's rows into parts. Each part is processed, written and kept as a whole.
Pure."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from typing import Any, NamedTuple

from ...io.errors import UsageError

NumberedRows = Iterable[tuple[int, Mapping[str, Any]]]
"""Rows with their numbers in the job, from 0."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Says where a part ends: at the row with which it reaches one of two sizes.

    Only the input decides, so the same rows are always cut in the same way.
    """

    num_rows: int
    num_bytes: int

    def is_full(self, num_rows: int, num_bytes: int) -> bool:
        """Whether a part with `num_rows` rows and `num_bytes` bytes of input is
        complete."""
        return num_rows >= self.num_rows or num_bytes >= self.num_bytes


class Position(NamedTuple):
    """A position between two rows of the input."""

    file: int = 0
    """The index of the file."""
    offset: int = 0
    """The position in that file: bytes (uncompressed), or rows for a file of
    columns."""
    row: int = 0
    """How many lines or rows of that file are before it."""


class InputRow(NamedTuple):
    """A row as it was read, and where it ends."""

    row: dict[str, Any]
    content: bytes
    """The text of the row in the file; for a file of columns, the row as JSON."""
    end: Position


@dataclass(frozen=True, slots=True)
class OutputPart:
    """Rows that are to be processed together."""

    number: int
    first_row: int
    """The number of rows in all previous parts."""
    rows: Sequence[Mapping[str, Any]]
    end: Position
    digest: str
    """The xxh3 digest of the content that was read."""
    known: Mapping[int, bytes] = field(default_factory=dict)
    """Results, as lines of JSON, of rows that are done already, by index in this
    part."""
    start: Position = field(default_factory=Position)
    """Where the part begins in the input."""

    def numbered(self) -> list[tuple[int, Mapping[str, Any]]]:
        """The rows that are not done yet, with their numbers in the job."""
        return [
            (self.first_row + index, row)
            for index, row in enumerate(self.rows)
            if index not in self.known
        ]


@dataclass(frozen=True, slots=True)
class PartRecord:
    """What is kept about a part that is done, beside its results."""

    number: int
    first_row: int
    start: Position
    """Where the part begins in the input."""
    num_rows: int
    num_errors: int
    end: Position
    """Where the next part begins."""
    input_digest: str
    num_bytes: int
    """The number of bytes of its results, as lines of JSON."""
    digest: str
    """The xxh3 digest of its results."""

    def begins_at(self, first_row: int, start: Position) -> bool:
        """Whether the part begins at `start`, and has `first_row` rows before it."""
        return (self.first_row, self.start) == (first_row, start)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "PartRecord":
        """The record of these values. Raises TypeError or KeyError if they are not a
        record."""
        places = {name: Position(*values[name]) for name in ("start", "end")}
        return cls(**{**values, **places})


def are_whole(records: Iterable[PartRecord]) -> bool:
    """Whether `records`, in this order, follow each other from the first row on,
    without a gap."""
    first_row, place = 0, Position()
    for number, record in enumerate(records):
        if record.number != number or not record.begins_at(first_row, place):
            return False
        first_row, place = first_row + record.num_rows, record.end
    return True


def lazy_parts(rows: Any, num_rows: int) -> Iterator[NumberedRows]:
    """`rows` (see `rows_of`) in parts of `num_rows`.

    A part must be used up before the next one is taken; rows are read lazily. Raises
    UsageError at once if `rows` are no rows.
    """
    return _parts(rows_of(rows), num_rows)


def _parts(rows: Iterable[Mapping[str, Any]], num_rows: int) -> Iterator[NumberedRows]:
    numbered = enumerate(rows)
    for first in numbered:
        yield chain([first], islice(numbered, num_rows - 1))


def rows_of(given: Any) -> Iterable[Mapping[str, Any]]:
    """Converts what a user gives as rows to rows.

    `given` is an iterable of rows or texts, one of either, or a table (Arrow, pandas,
    polars). Raises UsageError for anything else, and for the name of a file.
    """
    if isinstance(given, str):
        if given.endswith(_FILES):
            raise UsageError(
                f"{given!r} is the name of a file: the command line reads those; give "
                "its rows"
            )
        return [_row(0, given)]
    if isinstance(given, Mapping):
        return [given]
    if hasattr(given, "to_pylist"):
        return _without_gaps(given.to_pylist())
    if hasattr(given, "iter_rows"):
        return _without_gaps(given.iter_rows(named=True))
    if hasattr(given, "to_dict") and hasattr(given, "columns"):
        return _without_gaps(given.to_dict("records"))
    if isinstance(given, (bytes, bytearray)) or not isinstance(given, Iterable):
        raise UsageError(
            f"{given!r:.100} holds no rows: give an iterable of them, such as "
            '{"text": "..."}, or of texts'
        )
    return (_row(number, one) for number, one in enumerate(given))


_FILES = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".gz", ".zst")


def _row(number: int, given: Any) -> Mapping[str, Any]:
    if isinstance(given, Mapping):
        return given
    if isinstance(given, str):
        return {"id": number, "text": given}
    what = f"row {number} is {given!r:.60}, neither a mapping of keys nor a text"
    return {"id": number, "error": what}


def _without_gaps(rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Removes values that a row of a table does not have: they are None or NaN."""
    for row in rows:
        yield {k: v for k, v in row.items() if v is not None and v == v}
