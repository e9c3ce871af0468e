"""From rows of text to token ids: which are to be scored, or to be gone on from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..io.errors import UsageError


class RowError(ValueError):
    """A row that nothing can be made of; the job goes on without it."""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A row ready to be scored: ids `first` and later are scored given those before."""

    ids: tuple[int, ...]
    first: int


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer beside the checkpoint. Raises UsageError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the tokenizer's files make it raise
        raise UsageError(
            f"no tokenizer can be loaded from {folder}: put the model's tokenizer "
            f"files there ({type(error).__name__})"
        ) from error


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
        prompt = _string(row, "prompt")
        return _completion(tokenizer, prompt, _string(row, "completion"))
    ids = tuple(tokenizer(_string(row, "text"))["input_ids"])
    if len(ids) < 2:
        raise RowError(
            f"the text has {len(ids)} tokens: at least 2 are needed, since the first "
            "has nothing before it"
        )
    return TokenRow(ids, 1)


def tokenize_prompt(tokenizer: Any, row: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens of `{"prompt"}`, of `{"text"}`, or of the chat `{"messages"}` as the
    tokenizer's template writes it. Raises RowError for a row without any."""
    if "messages" in row:
        return _chat(tokenizer, row["messages"])
    text = _string(row, "prompt" if "prompt" in row else "text")
    ids = tuple(tokenizer(text)["input_ids"])
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
        ids = tuple(tokenizer(prompt + completion)["input_ids"])
        first = len(tokenizer(prompt)["input_ids"])
    else:
        encoded = tokenizer(
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


def _string(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        keys = ", ".join(map(str, row)) or "none"
        what = "is missing" if value is None else f"is {value!r}, not a string"
        raise RowError(
            f'{key!r} {what}: a row needs "text", or "prompt" and "completion" '
            f"(it has: {keys})"
        )
    return value
