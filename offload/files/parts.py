"""A job's rows, cut into parts: each is done, written and kept as a whole. Pure."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from typing import Any, NamedTuple

from ...io.errors import UsageError

NumberedRows = Iterable[tuple[int, Mapping[str, Any]]]
"""Rows, each with its number in the job (from 0)."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a part ends: with the row that makes it so long. What a row has become does
    not matter, so the same rows are always cut alike."""

    num_rows: int
    num_bytes: int

    def is_full(self, num_rows: int, num_bytes: int) -> bool:
        """Whether a part of so many rows, of so many bytes of input, ends here."""
        return num_rows >= self.num_rows or num_bytes >= self.num_bytes


class Position(NamedTuple):
    """A place between two rows of the input."""

    file: int = 0
    """Of the job's files."""
    offset: int = 0
    """In that file: bytes (uncompressed) of one of lines, rows of one of columns."""
    row: int = 0
    """Lines or rows of that file before this place."""


class InputRow(NamedTuple):
    """A row as it was read."""

    row: dict[str, Any]
    content: bytes
    """What stood in the file, or what it comes to."""
    end: Position


@dataclass(frozen=True, slots=True)
class OutputPart:
    """Rows that are to be done."""

    number: int
    first_row: int
    """How many rows are in the parts before."""
    rows: Sequence[Mapping[str, Any]]
    end: Position
    digest: str
    """xxh3 of what was read."""
    known: Mapping[int, bytes] = field(default_factory=dict)
    """Results, as lines, of rows (from 0 in this part) that are done already."""
    start: Position = field(default_factory=Position)
    """Where in the input it begins."""

    def numbered(self) -> list[tuple[int, Mapping[str, Any]]]:
        """The rows that are left to do, by their number in the job."""
        return [
            (self.first_row + index, row)
            for index, row in enumerate(self.rows)
            if index not in self.known
        ]


@dataclass(frozen=True, slots=True)
class PartRecord:
    """What is kept of a part that is done, beside its results."""

    number: int
    first_row: int
    start: Position
    """Where in the input it begins,"""
    num_rows: int
    num_errors: int
    end: Position
    """and where the next one does."""
    input_digest: str
    num_bytes: int
    """Bytes of its results, as lines."""
    digest: str
    """xxh3 of these."""

    def begins_at(self, first_row: int, start: Position) -> bool:
        """Whether it goes on where the parts before it end."""
        return (self.first_row, self.start) == (first_row, start)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "PartRecord":
        """Raises TypeError or KeyError for what is no record."""
        places = {name: Position(*values[name]) for name in ("start", "end")}
        return cls(**{**values, **places})


def are_whole(records: Iterable[PartRecord]) -> bool:
    """Whether these parts, in this order, are all that come from the first row on: none
    is missing, and each goes on where the one before it ended."""
    first_row, place = 0, Position()
    for number, record in enumerate(records):
        if record.number != number or not record.begins_at(first_row, place):
            return False
        first_row, place = first_row + record.num_rows, record.end
    return True


def lazy_parts(rows: Any, num_rows: int) -> Iterator[NumberedRows]:
    """`rows` (see `rows_of`) in parts of `num_rows`, none of which is taken before it
    is asked for. Each is to be used up before the next. Raises UsageError at once for
    what holds no rows."""
    return _parts(rows_of(rows), num_rows)


def _parts(rows: Iterable[Mapping[str, Any]], num_rows: int) -> Iterator[NumberedRows]:
    numbered = enumerate(rows)
    for first in numbered:
        yield chain([first], islice(numbered, num_rows - 1))


def rows_of(given: Any) -> Iterable[Mapping[str, Any]]:
    """What somebody gives as rows, as rows: an iterable of them or of texts, one of
    either, or a table (Arrow, pandas, polars). Raises UsageError for anything else, and
    for the name of a file."""
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
    """What a row of a table has not is None, or NaN, there."""
    for row in rows:
        yield {k: v for k, v in row.items() if v is not None and v == v}
