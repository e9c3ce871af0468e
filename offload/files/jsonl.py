"""Reads rows from lines of JSON or text, and writes results as lines of JSON."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, NoReturn

from ...io.errors import InputError

SCORED_KEYS = {"text": '"text"', "prompt": '"prompt" and "completion"'}
TEXT_KEYS = {"text": '"text"'}
ASKED_KEYS = {"prompt": '"prompt"', "text": '"text"'}
PROMPT_KEYS = {"prompt": '"prompt"', "text": '"text"', "messages": '"messages"'}
# A longer line is refused: a file without line ends is of another kind.
_MAX_LINE_BYTES = 32 << 20


def split_lines(chunks: Iterable[bytes], name: str) -> Iterator[bytes]:
    """The lines in `chunks` (bytes of the file `name`), each with its line end. Raises
    InputError if a line is too long."""
    pieces: list[bytes] = []
    num_bytes = 0
    for chunk in chunks:
        *whole, rest = chunk.split(b"\n")
        for line in whole:
            yield b"".join((*pieces, line, b"\n")) if pieces else line + b"\n"
            pieces, num_bytes = [], 0
        if rest:
            pieces.append(rest)
            num_bytes += len(rest)
            if num_bytes > _MAX_LINE_BYTES:
                raise InputError(
                    f"{name} has a line of more than {_MAX_LINE_BYTES} bytes: it needs "
                    "a JSON object a line"
                )
    if pieces:
        yield b"".join(pieces)


class RowRecord(NamedTuple):
    """A row in a file of bytes, not parsed yet."""

    content: bytes
    num_bytes: int
    """Bytes from the end of the previous row to the end of this one."""
    num_lines: int
    """Lines from the previous row to this one, this one's included; array elements
    count as one."""
    parse: Callable[[str], dict[str, Any]]
    """Returns the row. Its argument says where the row is, for the error. A row that
    cannot be parsed has the key "error"."""


def line_records(
    lines: Iterable[bytes], parse: Callable[[bytes, str], dict[str, Any]]
) -> Iterator[RowRecord]:
    """A row for each line; blank lines are skipped."""
    num_bytes = num_lines = 0
    for line in lines:
        num_bytes, num_lines = num_bytes + len(line), num_lines + 1
        if line.strip():
            yield RowRecord(line, num_bytes, num_lines, partial(parse, line))
            num_bytes = num_lines = 0


def text_row(line: bytes, where: str) -> dict[str, Any]:
    """The row of a line of text; with an "error" if it is not UTF-8."""
    try:
        return {"text": line.decode("utf-8-sig").rstrip("\r\n")}
    except UnicodeDecodeError as error:
        return {"error": f"{where} is not valid UTF-8: {error.reason}"}


def parse_row(line: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `line`. If there is none, a row with an "error", which says
    `where` the line is and what is wrong."""
    try:
        row = json.loads(line, parse_constant=_refuse, parse_float=_finite)
    except UnicodeDecodeError as error:
        return {"error": f"{where} is not valid UTF-8: {error.reason}"}
    except (ValueError, RecursionError) as error:
        return {"error": f"{where} is not valid JSON: {error}"}
    if not isinstance(row, dict):
        return {"error": f"{where} is not a JSON object: {row!r:.40}"}
    row.pop("error", None)  # a key of the input is no failure of ours
    return row


def checked(
    row: dict[str, Any], where: str, identity: Any, any_of: Mapping[str, str]
) -> dict[str, Any]:
    """Adds an "id" to `row`, and an "error" if the row cannot be used.

    `identity` is the id if the row has none. A row needs one of the keys `any_of`,
    whose values name them in the error, and an id that JSON can hold.
    """
    if "id" in row and not _is_writable(row["id"]):
        del row["id"]
        row["error"] = f'{where} has an "id" that JSON cannot hold, or too deep a one'
    if "error" not in row and not any_of.keys() & row.keys():
        keys = ", ".join(row) or "none"
        wanted = ", nor ".join(any_of.values())
        row["error"] = f"{where} has no {wanted} (keys: {keys})"
    row.setdefault("id", identity)
    return row


def line_of(result: Any) -> bytes:
    """One result, or one of its values, as a line of UTF-8.

    Text with half of a surrogate pair, which UTF-8 cannot encode, is escaped.
    """
    text = json.dumps(result, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(result, allow_nan=False).encode() + b"\n"


def is_encodable(text: str) -> bool:
    """Whether UTF-8 can encode `text`: it contains no half of a surrogate pair."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def failed_line(identity: Any, message: str) -> bytes:
    """The line of a row that failed, whatever its id is."""
    if not _is_writable(identity):
        identity = f"{type(identity).__name__}"
    return line_of({"id": identity, "error": message})


def _is_writable(identity: Any) -> bool:
    if isinstance(identity, (str, int)):
        return True
    try:
        line_of({"id": identity})
    except (ValueError, TypeError, RecursionError):
        return False
    return True


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.20} is too large a number")
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")
