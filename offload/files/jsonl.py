"""Lines of JSON: rows in, results out."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

from ...io.errors import InputError

SCORED_KEYS = {"text": '"text"', "prompt": '"prompt" and "completion"'}
TEXT_KEYS = {"text": '"text"'}
ASKED_KEYS = {"prompt": '"prompt"', "text": '"text"'}
PROMPT_KEYS = {"prompt": '"prompt"', "text": '"text"', "messages": '"messages"'}
# A longer one is no row: what has no line ends is another kind of file.
_MAX_LINE_BYTES = 1 << 30


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


def parse_row(line: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `line`, or a row with an "error" that says `where` it stood
    and why it is none."""
    try:
        row = json.loads(line, parse_constant=_refuse)
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
    keys `any_of` (and how an error names each)."""
    if "error" not in row and not any_of.keys() & row.keys():
        keys = ", ".join(row) or "none"
        wanted = ", nor ".join(any_of.values())
        row["error"] = f"{where} has no {wanted} (keys: {keys})"
    row.setdefault("id", identity)
    return row


def line_of(result: Mapping[str, Any]) -> bytes:
    """One result as a line of UTF-8. Half of a surrogate pair, which UTF-8 has not, is
    written as JSON escapes it."""
    text = json.dumps(result, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(result, allow_nan=False).encode() + b"\n"


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON's")
