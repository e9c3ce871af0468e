"""Turns a row's messages into tokens, with the tokenizer's chat template."""

from collections.abc import Mapping
from typing import Any

from ..files.json_rows import CHAT
from .row_error import RowError
from .template_budget import template_budget
from .template_check import check_template

_OURS = frozenset(
    {
        "chat_template",
        "conversation",
        "max_length",
        "padding",
        "processor_kwargs",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
"""Arguments of `apply_chat_template` that the template does not get."""
_ARGUMENTS = frozenset({"add_generation_prompt", "continue_final_message", "documents"})


def tokenize_chat(tokenizer: Any, row: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens of `{"messages"}`, with "tools" and "chat_template_kwargs" if the row
    has them.

    Raises RowError if the template does not take them or would ignore them.
    """
    messages = row["messages"]
    template = getattr(tokenizer, "chat_template", None)
    if template is None:
        raise RowError(
            'the row has "messages", but the tokenizer has no chat template: give '
            'it a "prompt"'
        )
    _check_messages(messages)
    options = {"add_generation_prompt": True, **_options(row, str(template))}
    try:
        with template_budget():
            for each in template.values() if isinstance(template, dict) else [template]:
                check_template(str(each))
            encoded = tokenizer.apply_chat_template(
                messages, **options, tokenize=True, return_dict=True
            )
    except Exception as error:  # a template may raise anything
        raise RowError(
            f"the chat template does not take these messages: {error}"
        ) from error
    ids = tuple(encoded["input_ids"])
    if not ids:
        raise RowError("the chat template makes no tokens of these messages")
    return ids


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RowError(
            f'the row\'s "messages" are {messages!r:.80}: a list of messages is needed'
        )
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RowError(
                f'message {number} is {message!r:.80}: it needs a "role" and "content"'
            )
        _check_content(number, message.get("content"))


def _check_content(number: int, content: Any) -> None:
    """Raises RowError unless the content is text, or parts of text."""
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, (list, tuple)):
        raise RowError(
            f"the content of message {number} is {content!r:.80}: neither a text nor a "
            "list of parts"
        )
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text":
            raise RowError(
                f"message {number} has a part of type {kind!r}: models are given text "
                "alone"
            )


def _options(row: Mapping[str, Any], template: str) -> dict[str, Any]:
    """The other arguments of the template."""
    tools, more = (row.get(key) for key in CHAT)
    found: dict[str, Any] = {}
    if tools:
        if not isinstance(tools, (list, tuple)) or not all(
            isinstance(tool, Mapping) for tool in tools
        ):
            raise RowError('the row\'s "tools" are not a list of objects')
        found["tools"] = list(tools)
    if more:
        if not isinstance(more, Mapping):
            raise RowError('the row\'s "chat_template_kwargs" are not an object')
        if ours := _OURS & more.keys():
            raise RowError(
                f'{min(ours)!r} of the row\'s "chat_template_kwargs" is not the chat '
                "template's"
            )
        found.update(more)
    for name in sorted(found.keys() - _ARGUMENTS):
        if name not in template:
            raise RowError(f"the tokenizer's chat template does not use {name!r}")
    return found
