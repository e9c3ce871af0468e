"""Lines of JSON, and of text: rows in, results out."""

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
# A longer one is no row: what has no line ends is another kind of file.
_MAX_LINE_BYTES = 32 << 20


def split_lines(chunks: Iterable[bytes], name: str) -> Iterator[bytes]:
    """The lines in `chunks` of bytes, with their ends."""
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
    """A row where it stands in a file of bytes."""

    content: bytes
    num_bytes: int
    """From the end of the one before it to its own;"""
    num_lines: int
    """in lines, or what is counted instead."""
    parse: Callable[[str], dict[str, Any]]
    """The row, given what an error calls its place: one with an "error" where it is
    none."""


def line_records(
    lines: Iterable[bytes], parse: Callable[[bytes, str], dict[str, Any]]
) -> Iterator[RowRecord]:
    """A row a line; blank ones are passed over."""
    num_bytes = num_lines = 0
    for line in lines:
        num_bytes, num_lines = num_bytes + len(line), num_lines + 1
        if line.strip():
            yield RowRecord(line, num_bytes, num_lines, partial(parse, line))
            num_bytes = num_lines = 0


def text_row(line: bytes, where: str) -> dict[str, Any]:
    """The row of a line of text."""
    try:
        return {"text": line.decode("utf-8-sig").rstrip("\r\n")}
    except UnicodeDecodeError as error:
        return {"error": f"{where} is no UTF-8: {error.reason}"}


def parse_row(line: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `line`, or a row with an "error" that says `where` it stood
    and why it is none."""
    try:
        row = json.loads(line, parse_constant=_refuse, parse_float=_finite)
    except UnicodeDecodeError as error:
        return {"error": f"{where} is no UTF-8: {error.reason}"}
    except (ValueError, RecursionError) as error:
        return {"error": f"{where} is no JSON: {error}"}
    if not isinstance(row, dict):
        return {"error": f"{where} is no JSON object: {row!r:.40}"}
    row.pop("error", None)  # an input's own key is no failure of ours
    return row


def checked(
    row: dict[str, Any], where: str, identity: Any, any_of: Mapping[str, str]
) -> dict[str, Any]:
    """`row` with an "id" (else `identity`), and an "error" where it has none of the
    keys `any_of` (and how an error names each), or an "id" that cannot be written."""
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
    """One result, or a value of it, as a line of UTF-8. Half of a surrogate pair, which
    UTF-8 has not, is written as JSON escapes it."""
    text = json.dumps(result, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(result, allow_nan=False).encode() + b"\n"


def is_encodable(text: str) -> bool:
    """Whether UTF-8 has it: no half of a surrogate pair is in it."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def failed_line(identity: Any, message: str) -> bytes:
    """A row's error as a line, whatever its id is."""
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
    raise ValueError(f"{constant} is no number of JSON's")
