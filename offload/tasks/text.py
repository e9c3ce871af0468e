"""From rows of text to token ids: which are to be scored, or to be gone on from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ...io.errors import UsageError
from ...io.front_door import about
from ...io.whole import read_json_object
from ..model import engine_of
from ..weights.trust import check_files, loading, own_code, refuse_code
from .template_budget import template_budget

T = TypeVar("T")


class RowError(ValueError):
    """A row that nothing can be made of; the job goes on without it."""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A row ready to be scored: ids `first` and later are scored given those before."""

    ids: tuple[int, ...]
    first: int


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer beside the checkpoint. Raises UsageError where there is none, and
    CheckpointError where only code of the checkpoint's own would make one, unless it is
    trusted."""
    from transformers import AutoTokenizer

    path = Path(folder) / "tokenizer_config.json"
    code = None
    check_files(Path(folder))
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
    """The tokenizer beside the checkpoint that the streamed `model` came from."""
    is_trusted = engine_of(model).policy.trust_remote_code
    return load_tokenizer(model.config.name_or_path, trust_remote_code=is_trusted)


def pad_of(tokenizer: Any) -> int:
    """The id that stands where nothing does; attention does not look at it."""
    pad = tokenizer.pad_token_id
    return 0 if pad is None else int(pad)


def context_length(model: Any) -> int | None:
    """Most tokens the model can attend to, or None where its config sets no limit."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def tokenize(tokenizer: Any, row: Mapping[str, Any]) -> TokenRow:
    """The tokens of `{"text"}`, or of `{"prompt", "completion"}` whose completion is
    scored. A token that reaches from the prompt into the completion counts as
    completion. Raises RowError for a row without what is needed."""
    if "completion" in row or "prompt" in row:
        prompt = text_of(row, "prompt")
        return _completion(tokenizer, prompt, text_of(row, "completion"))
    return _scored(_encoded(tokenizer, text_of(row, "text"))["input_ids"])


def tokenize_all(
    tokenizer: Any, rows: Sequence[Mapping[str, Any]]
) -> list[TokenRow | RowError]:
    """What `tokenize` gives or raises for each of `rows`, and for one that has an
    "error" that error. A fast tokenizer gets all texts at once."""
    is_fast = getattr(tokenizer, "is_fast", False)
    texts = [row["text"] for row in rows if is_fast and _is_text(row)]
    try:
        encoded = iter(tokenizer(texts)["input_ids"] if texts else ())
    except Exception:  # of one of them, which is found where each is by itself
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
    """The tokens of the `{"text"}` of each of `rows`, or why there are none."""

    def ids_of(row: Mapping[str, Any]) -> tuple[int, ...]:
        if "error" in row:
            raise RowError(str(row["error"]))
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
    """Whether all that there is to tokenize is its text."""
    others = {"error", "prompt", "completion"}
    return isinstance(row.get("text"), str) and not others & row.keys()


def _outcome(
    row: Mapping[str, Any], make: Callable[[], TokenRow]
) -> TokenRow | RowError:
    if "error" in row:
        return RowError(str(row["error"]))
    return _or_error(make)


def _encoded(tokenizer: Any, text: str, **options: Any) -> Any:
    """What the tokenizer makes of a text; RowError where it makes nothing of it, such
    as of half a surrogate pair."""
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
    """The tokens of `{"prompt"}`, of `{"text"}`, or of the chat `{"messages"}` as the
    tokenizer's template writes it. Raises RowError for a row without any."""
    if "messages" in row:
        return _chat(tokenizer, row["messages"])
    text = text_of(row, "prompt" if "prompt" in row else "text")
    ids = tuple(_encoded(tokenizer, text)["input_ids"])
    if not ids:
        raise RowError("the prompt has no tokens: there is nothing to go on from")
    return ids


def _chat(tokenizer: Any, messages: Any) -> tuple[int, ...]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise RowError(
            'the row has "messages", but the tokenizer has no chat template: give '
            'it a "prompt"'
        )
    try:
        with template_budget():
            encoded = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True
            )
    except Exception as error:  # whatever the template makes of it
        raise RowError(
            f"the chat template does not take these messages: {error}"
        ) from error
    return tuple(encoded["input_ids"])


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
    """What a row has at `key`. Raises RowError where that is no text."""
    value = row.get(key)
    if not isinstance(value, str):
        keys = ", ".join(map(str, row)) or "none"
        what = "is missing" if value is None else f"is {value!r}, not a string"
        raise RowError(
            f'{key!r} {what}: a row needs "text", or "prompt" and "completion" '
            f"(it has: {keys})"
        )
    return value
