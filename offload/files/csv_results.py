"""Writes results as comma-separated values, and reads them back."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

from .compression import CHUNK_BYTES, decompressed
from .csv_rows import csv_fields
from .sources import Compression

Lines = Iterable[bytes]


def csv_lines(lines: Callable[[], Lines]) -> Iterator[bytes]:
    """Converts results, lines of JSON, to CSV below a line with the names of the
    columns.

    Text is written as it is, any other value as JSON. A key that a result lacks becomes
    an empty field.
    """
    names = list(dict.fromkeys(name for line in lines() for name in json.loads(line)))
    if names:
        yield _written(names)
    for line in lines():
        result = json.loads(line)
        yield _written([_field(result.get(name)) for name in names])


def csv_results(path: Path, compression: Compression) -> Iterator[bytes]:
    """The results in a file that `csv_lines` made, as lines of JSON.

    All values are text; writing the lines again gives the same file. A row that failed
    has only its id and its error.
    """
    with path.open("rb") as file:
        chunks = iter(partial(file.read, CHUNK_BYTES), b"")
        rows = csv_fields(decompressed(chunks, compression, str(path)), str(path))
        names, _ = next(rows, ([], []))
        for values, _ in rows:
            result = dict(zip(names, values, strict=True))
            if not result.get("error"):
                result.pop("error", None)
            else:
                result = {name: result[name] for name in ("id", "error")}
            yield json.dumps(result).encode() + b"\n"


def _written(fields: Iterable[str]) -> bytes:
    """A line of CSV in UTF-8. Half of a surrogate pair, which UTF-8 cannot encode, is
    written as \\ud800."""
    text = StringIO()
    # With this line end, fields that contain either of its characters are quoted.
    csv.writer(text, lineterminator="\r\n").writerow(fields)
    line = text.getvalue().removesuffix("\r\n") + "\n"
    return line.encode("utf-8", "backslashreplace")


def _field(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
