"""Takes rows that have ended out of a micro-batch, while the others go on.

Knows what transformers hands from one step of `generate` to the next; under test with
every model that completes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

ROW_BY_ROW = frozenset(
    {
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "ExponentialDecayLengthPenalty",
        "ForcedEOSTokenLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "MinPLogitsWarper",
        "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopHLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
    }
)
"""Processors that look at each row's ids and scores and remember nothing of it."""


def may_shrink(
    processors: Sequence[Any], arguments: Mapping[str, Any], num_rows: int
) -> bool:
    """Whether rows can be taken out: each of the model's `arguments` is of the whole
    micro-batch or has a row for each, and no processor remembers rows."""
    return all(type(each).__name__ in ROW_BY_ROW for each in processors) and all(
        value.dim() > 0 and value.shape[0] == num_rows
        for value in arguments.values()
        if isinstance(value, torch.Tensor)
    )


def shrunk(
    model: Any,
    arguments: Mapping[str, Any],
    ids: torch.Tensor,
    rows: Sequence[int],
    *,
    num_new_tokens: int,
) -> dict[str, Any]:
    """The `arguments` of the model's next call, for `rows` alone, after all had
    `num_new_tokens` more and are `ids` now. Their cache loses the other rows."""
    found: dict[str, Any] = model._update_model_kwargs_for_generation(
        {}, dict(arguments), num_new_tokens=num_new_tokens
    )
    if found.get("attention_mask") is None:
        # By the mask's length transformers knows that `ids` begin with what is cached.
        found["attention_mask"] = torch.ones_like(ids)
    found["past_key_values"].batch_select_indices(torch.tensor(rows))
    for name, value in found.items():
        if isinstance(value, torch.Tensor):
            found[name] = value[list(rows)]
    return found
