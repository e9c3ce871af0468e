"""The keys of a row: which a task uses, and which it must not pass over in silence."""

from collections.abc import Mapping
from typing import Any

TEXTS = ("text", "prompt", "completion")
CHAT = ("tools", "chat_template_kwargs")
"""What the tokenizer's chat template is given beside "messages"."""
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
"""How a row is to be completed."""

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
"""Keys that model APIs know and no task here uses, each with the value that changes
nothing."""

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
"""The same of what is asked of a model that answers, or shown to it: elsewhere these
are columns like others."""

_BY_ANSWERS = {
    True: {**UNUSED, **ASKED},
    False: {**UNUSED, **dict.fromkeys((*SAMPLING, *CHAT))},
}


def columns_of(any_of: Mapping[str, str]) -> frozenset[str]:
    """The only columns that are read, of those that a file has, for a task whose rows
    need one of the keys `any_of`."""
    asked = ASKED if "messages" in any_of else ()
    known = ("id", *TEXTS, "messages", "labels", *CHAT, *SAMPLING, *UNUSED, *asked)
    return frozenset((*any_of, *known))


def refused(row: Mapping[str, Any], *, answers: bool) -> str | None:
    """Why `row` cannot be done for a key that would change what comes of it and is not
    used; None where there is none. Other keys, such as "category", are left alone: they
    mean nothing to a model. With `answers` the row is completed."""
    unused = _BY_ANSWERS[answers]
    for key in unused.keys() & row.keys():
        if not _is_neutral(row[key], unused[key]):
            return (
                f'the row has "{key}", which is not used here and would change what '
                "comes of it: leave it out"
            )
    return None


def _is_neutral(value: Any, neutral: Any) -> bool:
    """Whether it is as if the key were not there."""
    if value is None or (isinstance(value, (str, list, dict)) and not value):
        return True
    if isinstance(value, (bool, int, float, str)):
        is_same_kind = isinstance(value, bool) == isinstance(neutral, bool)
        return is_same_kind and value == neutral
    return False
