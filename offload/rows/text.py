"""Turns rows of text into token ids, for scoring or for completion."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ...io.errors import UsageError
from ...io.regular_file import read_json_object
from ...io.user_errors import about
from ..configs.trust import check_files, loading, own_code, refuse_code
from ..files.json_rows import CHAT, refused
from ..model import engine_of
from .chat import tokenize_chat
from .row_error import RowError
from .tokenizer_check import check_tokenizer

T = TypeVar("T")
MOST_LETTERS = 4_000_000
"""The most characters of a text: a million tokens, for which a tokenizer takes 1 GB."""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A row to score: `ids` from index `first` on are scored, given those before
    them."""

    ids: tuple[int, ...]
    first: int


def check_row(row: Mapping[str, Any], *, answers: bool = False) -> None:
    """Raises RowError if the row has failed before, or has a key that would change the
    result but is not used.

    `answers` says whether the task completes rows.
    """
    if "error" in row:
        raise RowError(str(row["error"]))
    if (why := refused(row, answers=answers)) is not None:
        raise RowError(why)


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Loads the tokenizer in the checkpoint's `folder`.

    Raises UsageError if there is none, and CheckpointError if it needs code of the
    checkpoint that is not trusted.
    """
    from transformers import AutoTokenizer

    path = Path(folder) / "tokenizer_config.json"
    code = None
    check_files(Path(folder))
    check_tokenizer(Path(folder))
    if path.exists():
        code = own_code(read_json_object(path))
    fix = "put the model's tokenizer files there"
    try:
        with about(
            f"no tokenizer can be loaded from {folder}", UsageError, fix=fix, every=True
        ):
            return AutoTokenizer.from_pretrained(folder, **loading(trust_remote_code))
    except UsageError:
        if code is not None and not trust_remote_code:
            raise refuse_code(path, code) from None
        raise


def tokenizer_of(model: Any) -> Any:
    """The tokenizer of the checkpoint that the streamed `model` was loaded from."""
    is_trusted = engine_of(model).policy.trust_remote_code
    return load_tokenizer(model.config.name_or_path, trust_remote_code=is_trusted)


def tokenize(tokenizer: Any, row: Mapping[str, Any]) -> TokenRow:
    """The tokens of `{"text"}`, or of `{"prompt", "completion"}`, whose completion is
    scored.

    A token that spans the end of the prompt belongs to the completion. Raises RowError
    if a key is missing.
    """
    if "completion" in row or "prompt" in row:
        prompt = text_of(row, "prompt")
        return _completion(tokenizer, prompt, text_of(row, "completion"))
    return _scored(_encoded(tokenizer, text_of(row, "text"))["input_ids"])


def tokenize_all(
    tokenizer: Any, rows: Sequence[Mapping[str, Any]]
) -> list[TokenRow | RowError]:
    """The result of `check_row` and `tokenize`, or the RowError, for each of `rows`.

    A fast tokenizer gets all texts at once.
    """
    is_fast = getattr(tokenizer, "is_fast", False)
    texts = [row["text"] for row in rows if is_fast and _is_text(row)]
    try:
        encoded = iter(tokenizer(texts)["input_ids"] if texts else ())
    except Exception:  # one text fails: find it by tokenizing each alone
        return [_outcome(row, partial(tokenize, tokenizer, row)) for row in rows]
    return [
        _outcome(row, partial(_scored, next(encoded)))
        if is_fast and _is_text(row)
        else _outcome(row, partial(tokenize, tokenizer, row))
        for row in rows
    ]


def tokenize_texts(
    tokenizer: Any, rows: Sequence[Mapping[str, Any]]
) -> list[tuple[int, ...] | RowError]:
    """The tokens of `{"text"}` of each of `rows`, or the RowError that says why there
    are none."""

    def ids_of(row: Mapping[str, Any]) -> tuple[int, ...]:
        check_row(row)
        ids = tuple(_encoded(tokenizer, text_of(row, "text"))["input_ids"])
        if not ids:
            raise RowError("the text has no tokens")
        return ids

    return [_or_error(partial(ids_of, row)) for row in rows]


def _or_error(make: Callable[[], T]) -> T | RowError:
    try:
        return make()
    except RowError as error:
        return error


def _is_text(row: Mapping[str, Any]) -> bool:
    """Whether the row has only its text to tokenize."""
    others = {"error", "prompt", "completion"}
    text = row.get("text")
    is_text = isinstance(text, str) and len(text) <= MOST_LETTERS
    return is_text and not others & row.keys()


def _outcome(
    row: Mapping[str, Any], make: Callable[[], TokenRow]
) -> TokenRow | RowError:
    def checked() -> TokenRow:
        check_row(row)
        return make()

    return _or_error(checked)


def _encoded(tokenizer: Any, text: str, **options: Any) -> Any:
    """What `tokenizer` returns for `text`. Raises RowError if it fails, for instance
    for half of a surrogate pair."""
    try:
        return tokenizer(text, **options)
    except Exception as error:
        raise RowError(
            f"the tokenizer does not take this text: {type(error).__name__}: {error}"
        ) from error


def _scored(ids: Sequence[int]) -> TokenRow:
    if len(ids) < 2:
        raise RowError(
            f"the text has {len(ids)} tokens: at least 2 are needed, since the first "
            "has nothing before it"
        )
    return TokenRow(tuple(ids), 1)


def tokenize_prompt(tokenizer: Any, row: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens of `{"prompt"}`, of `{"text"}`, or of the chat `{"messages"}`, which
    the tokenizer's template formats.

    Raises RowError if the row has none of them.
    """
    if row.get("messages") is not None:
        return tokenize_chat(tokenizer, row)
    for key in CHAT:
        if row.get(key):
            raise RowError(f'the row has "{key}", which needs "messages"')
    text = text_of(row, "prompt" if "prompt" in row else "text")
    ids = tuple(_encoded(tokenizer, text)["input_ids"])
    if not ids:
        raise RowError("the prompt has no tokens: there is nothing to go on from")
    return ids


def _completion(tokenizer: Any, prompt: str, completion: str) -> TokenRow:
    if not tokenizer.is_fast:
        ids = tuple(_encoded(tokenizer, prompt + completion)["input_ids"])
        first = len(_encoded(tokenizer, prompt)["input_ids"])
    else:
        encoded = _encoded(
            tokenizer,
            prompt + completion,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        ids = tuple(encoded["input_ids"])
        first = len(ids)
        marks = zip(
            encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True
        )
        for index, ((_, end), is_special) in enumerate(marks):
            if not is_special and end > len(prompt):
                first = index
                break
    if first >= len(ids):
        raise RowError("the completion has no tokens")
    if first == 0:
        raise RowError(
            "the prompt has no tokens, so the completion's first has nothing before it"
        )
    return TokenRow(ids, first)


def text_of(row: Mapping[str, Any], key: str) -> str:
    """The text at `key` of the row. Raises RowError if it is not text, or is too
    long."""
    value = row.get(key)
    if not isinstance(value, str):
        keys = ", ".join(map(str, row)) or "none"
        what = "is missing" if value is None else f"is {value!r}, not a string"
        raise RowError(
            f'{key!r} {what}: a row needs "text", or "prompt" and "completion" '
            f"(it has: {keys})"
        )
    if len(value) > MOST_LETTERS:
        raise RowError(
            f"{key!r} has {len(value):,} letters: a text may have {MOST_LETTERS:,}; "
            "split it into several rows"
        )
    return value
