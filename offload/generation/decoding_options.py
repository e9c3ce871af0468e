"""The options of one way to complete rows, and which rows may share a micro-batch."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import StoppingCriteriaList, StopStringCriteria
from transformers.generation.configuration_utils import GenerationMode

from ...io.errors import UsageError
from ...io.user_errors import about
from ..rows.limits import Limits
from .option_values import set_numbers
from .row_sampling import NUMBERS, number_of

Company = Literal["any", "equal", "alone"]
"""Which rows may share a micro-batch without changing each other's results: any, those
with as many tokens (if padding has an effect), or none."""

_OUTPUTS = (
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
)
_CACHES = ("offloaded", "offloaded_static", "offloaded_hybrid", "quantized", "paged")
_ANY = frozenset(
    {
        "begin_suppress_tokens",
        "bos_token_id",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "decoder_start_token_id",
        "disable_compile",
        "do_sample",
        "early_stopping",
        "eos_token_id",
        "epsilon_cutoff",
        "eta_cutoff",
        "exponential_decay_length_penalty",
        "forced_eos_token_id",
        "length_penalty",
        "low_memory",
        "max_cache_len",
        "max_new_tokens",
        "min_new_tokens",
        "min_p",
        "no_repeat_ngram_size",
        "num_beams",
        "num_return_sequences",
        "pad_token_id",
        "prefill_chunk_size",
        "remove_invalid_values",
        "renormalize_logits",
        "return_dict_in_generate",
        "stop_strings",
        "repetition_penalty",
        "suppress_tokens",
        "temperature",
        "top_h",
        "top_k",
        "top_p",
        "transformers_version",
        "typical_p",
        "use_cache",
    }
)
"""Options that are not affected by padding, or are protected from it by `unpadded`."""
_MOST_SEQUENCES = 10_000
_MOST_PLACES = 1 << 25
_TOKEN_CHARACTERS = 8
NOT_HERE = {
    "max_time": "a completion would depend on the clock, and not be made again",
    "assistant_early_exit": "a model cannot leave layers out that are streamed",
    "dola_layers": "it needs what layers in between give",
    "use_mtp": "layers that predict several tokens are not loaded",
    "token_healing": "it changes the prompt",
}
"""Options that are refused, and why."""
_UNPADDED = ("no_repeat_ngram_size", "repetition_penalty")
"""Options that are protected from padding if tokens are picked one by one."""


@dataclass(frozen=True, slots=True, eq=False)
class DecodingOptions:
    """The options with which some rows are completed."""

    config: Any
    """transformers' GenerationConfig."""
    stop: tuple[str, ...]
    max_new_tokens: int
    ends: frozenset[int]
    """The ids of tokens that end a text."""
    pad: int

    @property
    def is_one_by_one(self) -> bool:
        """Whether tokens are picked one by one for each row: without beams and without
        an assistant."""
        mode = self.config.get_generation_mode()
        return mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)

    @property
    def num_sequences(self) -> int:
        """The number of sequences of each row: beams, or several completions."""
        config = self.config
        return max(config.num_beams or 1, config.num_return_sequences or 1)

    @property
    def company(self) -> Company:
        mode = self.config.get_generation_mode()
        if not self.is_one_by_one and mode != GenerationMode.BEAM_SEARCH:
            return "alone"
        known = {key for key in vars(type(self.config)()) if not key.startswith("_")}
        asked = {key for key in known if getattr(self.config, key, None)}
        kept = _ANY if self.is_one_by_one else _ANY.difference(_UNPADDED)
        return "any" if asked <= kept else "equal"


def way_of(
    default: Any,
    tokenizer: Any,
    limits: Limits,
    *,
    max_new_tokens: int,
    stop: Sequence[str],
    options: Mapping[str, Any],
    note: Callable[[str], None] = lambda text: None,
) -> DecodingOptions:
    """Combines the model's generation config `default` with `options`.

    `note` is called with what of `default` is not used. Raises UsageError for options
    that transformers does not know, that cannot be combined, or that are not used here.
    """
    _refuse_unused(options)
    options = {**options, "max_new_tokens": max_new_tokens, "max_length": None}
    config = _configured(default, options, note)
    for key in ("num_beams", "num_return_sequences"):
        if (getattr(config, key) or 1) > _MOST_SEQUENCES:
            raise UsageError(
                f"{key} is {getattr(config, key):,}: a prompt goes on in at most "
                f"{_MOST_SEQUENCES:,} ways; set it lower"
            )
    stop = (*stop, *(config.stop_strings or ()))
    config.stop_strings = None
    found = config.eos_token_id
    found = tokenizer.eos_token_id if found is None else found
    ends = frozenset([found] if isinstance(found, int) else found or ())
    pad = limits.pad_of(
        config.pad_token_id, tokenizer.pad_token_id, min(ends, default=None)
    )
    config.pad_token_id = pad
    if ends:
        config.eos_token_id = sorted(ends)
    stop = tuple(dict.fromkeys(stop))
    return DecodingOptions(config, stop, max_new_tokens, ends, pad)


def criteria_of(tokenizer: Any, stop: Sequence[str]) -> StoppingCriteriaList:
    """Stopping criteria that end a text at one of `stop`. They take megabytes with a
    large vocabulary.

    Raises UsageError if no tokens make a string, or if there are too many or too long
    strings.
    """
    criteria = StoppingCriteriaList()
    if stop:
        _check_stop(tokenizer, stop)
        with about(f"stop strings {list(stop)!r:.200}", UsageError, every=True):
            criteria.append(StopStringCriteria(tokenizer, list(stop)))
    return criteria


def _check_stop(tokenizer: Any, stop: Sequence[str]) -> None:
    """Raises UsageError if there is too much to compare: transformers compares each
    token with each position in each string."""
    longest = max(map(len, stop))
    tokens = len(tokenizer)
    if tokens * len(stop) * (longest + _TOKEN_CHARACTERS) > _MOST_PLACES:
        most = _MOST_PLACES // tokens
        raise UsageError(
            f"there are {len(stop)} stop strings of up to {longest} characters: with "
            f"{tokens} tokens their number, times {_TOKEN_CHARACTERS} and the longest "
            f"one's characters, may be {most}"
        )


def _configured(
    default: Any, options: Mapping[str, Any], note: Callable[[str], None]
) -> Any:
    """The generation config with `options`.

    A temperature of 0 means greedy decoding; another one, or a limit on the drawn
    tokens, means sampling.
    """
    config = copy.deepcopy(default)
    values = dict(options)
    unknown = [key for key in values if not hasattr(config, key)]
    if unknown:
        raise UsageError(
            f"transformers' generate has no option {unknown[0]!r}: see "
            "transformers.GenerationConfig for those it has"
        )
    for key in NUMBERS & values.keys():
        if values[key] is not None:
            try:
                values[key] = number_of(key, values[key])
            except ValueError as error:
                raise UsageError(f"the option {error}") from error
    _leave_out(config, values, note)
    values.pop("return_dict_in_generate", None)  # only the form of the result
    if isinstance(values.get("stop_strings"), str):
        values["stop_strings"] = [values["stop_strings"]]
    if values.get("temperature") == 0:
        values.pop("temperature")
        config.temperature = None
        values["do_sample"] = False
    elif values.keys() & {"temperature", "top_k", "top_p", "min_p"}:
        values.setdefault("do_sample", True)
    for key, value in values.items():
        setattr(config, key, value)
    set_numbers(config)
    try:
        config.validate()
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"these options cannot be combined: {error}") from error
    if config.do_sample and config.temperature == 0:
        raise UsageError(
            "the model's generation_config.json asks to sample at temperature 0, which "
            "is not possible: give a temperature (0 takes the likeliest)"
        )
    return config


def _refuse_unused(values: Mapping[str, Any]) -> None:
    if values.get("max_length") is not None:
        raise UsageError(
            "max_length would also count the prompt: set max_new_tokens, the number of "
            "new tokens"
        )
    for key, why in NOT_HERE.items():
        if values.get(key):
            raise UsageError(f"{key} is not used here: {why}; leave it out")
    for key in _OUTPUTS:
        if values.get(key):
            raise UsageError(
                f"{key} has no place in the results of generate: leave it out, or call "
                "model.generate() of a loaded model"
            )
    if values.get("cache_implementation") in _CACHES:
        raise UsageError(
            f"cache_implementation={values['cache_implementation']} is not used here: "
            "the policy's kv says where keys and values are (kv.tier, kv.dtype)"
        )


def _leave_out(
    config: Any, values: Mapping[str, Any], note: Callable[[str], None]
) -> None:
    """Removes options of the checkpoint's generation_config.json that concern how
    transformers keeps or returns things, and notes them."""
    # transformers replaces None by what the file says.
    instead = {"cache_implementation": "dynamic", "return_dict_in_generate": False}
    instead |= dict.fromkeys(NOT_HERE)
    for key in (*instead, *_OUTPUTS):
        value = getattr(config, key, None)
        if value and key not in values:
            note(f"{key}: {value} of the model's generation_config.json is not used")
        if value:
            setattr(config, key, instead.get(key, False))
    if isinstance(config.stop_strings, str):
        config.stop_strings = [config.stop_strings]
