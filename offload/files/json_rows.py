"""Rows as JSON objects: their keys, reading them from lines, and writing results as
lines. Keys that must not be ignored silently are known here, too."""

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
TEXTS = ("text", "prompt", "completion")
CHAT = ("tools", "chat_template_kwargs")
"""Keys that are passed on to the tokenizer's chat template, beside "messages"."""
SAMPLING = (
    "max_tokens",
    "max_new_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "n",
    "stop",
    "seed",
)
"""Keys that say how a row is completed."""

UNUSED: Mapping[str, Any] = {
    "add_generation_prompt": True,
    "add_special_tokens": True,
    "bad_words": None,
    "best_of": 1,
    "chat_template": None,
    "continue_final_message": False,
    "do_sample": None,
    "documents": None,
    "echo": False,
    "frequency_penalty": 0,
    "function_call": None,
    "functions": None,
    "guided_choice": None,
    "guided_decoding": None,
    "guided_grammar": None,
    "guided_json": None,
    "guided_regex": None,
    "ignore_eos": False,
    "length_penalty": 1,
    "logit_bias": None,
    "max_length": None,
    "min_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "parallel_tool_calls": True,
    "presence_penalty": 0,
    "reasoning_effort": None,
    "response_format": None,
    "stop_strings": None,
    "stop_token_ids": None,
    "stream": False,
    "structured_outputs": None,
    "tool_choice": "auto",
    "top_logprobs": None,
    "truncate_prompt_tokens": None,
    "typical_p": 1,
    "use_beam_search": False,
}
"""Keys that other model APIs have and no task here uses. The value of each is the one
that changes nothing."""

ASKED: Mapping[str, Any] = {
    "audio": None,
    "image": None,
    "images": None,
    "instructions": None,
    "logprobs": False,
    "suffix": None,
    "system": None,
    "video": None,
    "videos": None,
}
"""The same for keys that a model's answer depends on. In tasks without answers they are
ordinary columns."""

_BY_ANSWERS = {
    True: {**UNUSED, **ASKED},
    False: {**UNUSED, **dict.fromkeys((*SAMPLING, *CHAT))},
}

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


def columns_of(any_of: Mapping[str, str]) -> frozenset[str]:
    """The columns that are read from a file of columns.

    `any_of` are the keys of which a row needs one.
    """
    asked = ASKED if "messages" in any_of else ()
    known = ("id", *TEXTS, "messages", "labels", *CHAT, *SAMPLING, *UNUSED, *asked)
    return frozenset((*any_of, *known))


def refused(row: Mapping[str, Any], *, answers: bool) -> str | None:
    """Why `row` cannot be processed; None if it can.

    That is a key which is not used here, although it would change the result. Keys that
    mean nothing to a model, such as "category", are ignored. `answers` says whether the
    task completes rows.
    """
    unused = _BY_ANSWERS[answers]
    for key in unused.keys() & row.keys():
        if not _is_neutral(row[key], unused[key]):
            return (
                f'the row has "{key}", which is not used here and would change what '
                "comes of it: leave it out"
            )
    return None


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


def _is_neutral(value: Any, neutral: Any) -> bool:
    """Whether `value` has the same effect as if the key were missing."""
    if value is None or (isinstance(value, (str, list, dict)) and not value):
        return True
    if isinstance(value, (bool, int, float, str)):
        is_same_kind = isinstance(value, bool) == isinstance(neutral, bool)
        return is_same_kind and value == neutral
    return False
