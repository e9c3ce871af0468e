"""Reads rows of comma-separated values. The first line names the columns."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ...io.errors import InputError
from .json_rows import CHAT, SAMPLING, RowRecord, split_lines

_MOST_CHARACTERS = 1 << 30
_NESTED = ("labels", "messages", "stop", *CHAT)
"""Columns whose fields may hold a JSON list or object."""
_NUMBERS = tuple(key for key in SAMPLING if key != "stop")


def csv_header(
    chunks: Iterable[bytes], any_of: Mapping[str, str], name: str
) -> Sequence[str]:
    """The names of the columns; none if the file is empty.

    Raises InputError if a column is missing or occurs twice.
    """
    first = next(csv_fields(chunks, name), None)
    if first is None:
        return ()
    names = [value.removeprefix("\ufeff").strip() for value in first[0]]
    if not any_of.keys() & set(names):
        wanted = ", nor ".join(any_of.values())
        raise InputError(
            f"{name} has no column {wanted} (its first line names the columns: "
            f"{', '.join(names)[:200]})"
        )
    twice = sorted({each for each in names if names.count(each) > 1})
    if twice:
        raise InputError(f"{name} has two columns that are named {twice[0]!r}")
    return names


def csv_records(
    chunks: Iterable[bytes], columns: Sequence[str], name: str, *, is_begun: bool
) -> Iterator[RowRecord]:
    """The rows in `chunks`.

    With `is_begun`, `chunks` begin with a row; otherwise with the line that names the
    columns. Raises InputError if the text cannot be divided into rows, for instance
    because a quote is not closed.
    """
    num_bytes = num_lines = 0
    for values, lines in csv_fields(chunks, name):
        num_bytes += sum(map(len, lines))
        num_lines += len(lines)
        if not is_begun:
            is_begun = True
        elif values:
            parse = partial(_row, values, columns)
            yield RowRecord(b"".join(lines), num_bytes, num_lines, parse)
            num_bytes = num_lines = 0


def csv_fields(
    chunks: Iterable[bytes], name: str
) -> Iterator[tuple[list[str], list[bytes]]]:
    """The fields of each row and the lines that they stand in, the line of names
    included."""
    lines: list[bytes] = []
    num_lines = 0

    def texts() -> Iterator[str]:
        for line in split_lines(chunks, name):
            lines.append(line)
            yield line.decode("utf-8", "surrogateescape")

    reader = csv.reader(texts(), strict=True)
    while True:
        # The limit belongs to the module, not to the reader. So it is restored each
        # time.
        before = csv.field_size_limit(_MOST_CHARACTERS)
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise InputError(
                f"{name} cannot be divided into rows from line {num_lines + 1} on: "
                f"{error}"
            ) from error
        finally:
            csv.field_size_limit(before)
        if values is None:
            return
        num_lines += len(lines)
        yield values, lines.copy()
        lines.clear()


def _row(values: Sequence[str], columns: Sequence[str], where: str) -> dict[str, Any]:
    if len(values) != len(columns):
        return {
            "error": f"{where} has {len(values)} fields, but the first line of the "
            f"file names {len(columns)} columns"
        }
    # An empty field counts as missing, as null does in other formats.
    fields = {n: v for n, v in zip(columns, values, strict=True) if v and n != "error"}
    try:
        "".join(fields.values()).encode()
    except UnicodeEncodeError:
        return {"error": f"{where} is not valid UTF-8"}
    return {name: _value(name, text) for name, text in fields.items()}


def _value(name: str, text: str) -> Any:
    """The value of a field.

    Fields of numbers, lists and objects are parsed as JSON. If one is not JSON, the
    text is returned; whoever uses it refuses it.
    """
    if name in _NUMBERS or (name in _NESTED and text.lstrip()[:1] in ("[", "{")):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    return text
