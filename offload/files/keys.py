"""The keys of a row: those that tasks use, and those that must not be ignored
silently."""

from collections.abc import Mapping
from typing import Any

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


def _is_neutral(value: Any, neutral: Any) -> bool:
    """Whether `value` has the same effect as if the key were missing."""
    if value is None or (isinstance(value, (str, list, dict)) and not value):
        return True
    if isinstance(value, (bool, int, float, str)):
        is_same_kind = isinstance(value, bool) == isinstance(neutral, bool)
        return is_same_kind and value == neutral
    return False
