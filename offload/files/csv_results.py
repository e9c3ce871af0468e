"""Results as comma-separated values, and back."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

from .compression import CHUNK_BYTES, decompressed
from .csv_rows import csv_fields
from .sources import Codec

Lines = Iterable[bytes]


def csv_lines(lines: Callable[[], Lines]) -> Iterator[bytes]:
    """The results in `lines` of JSON as rows below the names of their columns. A text
    is written as it is, anything else as JSON writes it; what a result lacks is empty.
    """
    names = list(dict.fromkeys(name for line in lines() for name in json.loads(line)))
    if names:
        yield _written(names)
    for line in lines():
        result = json.loads(line)
        yield _written([_field(result.get(name)) for name in names])


def csv_results(path: Path, codec: Codec) -> Iterator[bytes]:
    """The results in a file that `csv_lines` made, as lines of JSON that it writes
    alike: all that they hold is text. Of a row that failed, its id and its error."""
    with path.open("rb") as file:
        chunks = iter(partial(file.read, CHUNK_BYTES), b"")
        rows = csv_fields(decompressed(chunks, codec, str(path)), str(path))
        names, _ = next(rows, ([], []))
        for values, _ in rows:
            result = dict(zip(names, values, strict=True))
            if not result.get("error"):
                result.pop("error", None)
            else:
                result = {name: result[name] for name in ("id", "error")}
            yield json.dumps(result).encode() + b"\n"


def _written(fields: Iterable[str]) -> bytes:
    """Half of a surrogate pair, which UTF-8 has not, is written as \\ud800."""
    text = StringIO()
    # With this end of a line, both of its characters are quoted where texts have them.
    csv.writer(text, lineterminator="\r\n").writerow(fields)
    line = text.getvalue().removesuffix("\r\n") + "\n"
    return line.encode("utf-8", "backslashreplace")


def _field(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
