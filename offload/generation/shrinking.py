"""Removes rows that have ended from a micro-batch, while the others continue.

Depends on what transformers passes from one step of `generate` to the next; tested with
every model that generates.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...io.devices.known import rows_of
from ...io.devices.queued_copy import queued_to

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
"""Logits processors that look at each row separately and remember nothing."""


def may_shrink(
    processors: Sequence[Any], arguments: Mapping[str, Any], num_rows: int
) -> bool:
    """Whether rows can be removed.

    Each tensor of the model's `arguments` must have a row for each sequence, and no
    processor may remember rows.
    """
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
    """The `arguments` of the model's next call, for `rows` only.

    All rows got `num_new_tokens` new tokens; `ids` are now int64 [all rows, tokens].
    The other rows are removed from the cache.
    """
    found: dict[str, Any] = model._update_model_kwargs_for_generation(
        {}, dict(arguments), num_new_tokens=num_new_tokens
    )
    if found.get("attention_mask") is None:
        # From the length of the mask, transformers knows that `ids` begin with what is
        # cached.
        found["attention_mask"] = torch.ones_like(ids)
    index = queued_to(torch.tensor(rows), ids.device)
    found["past_key_values"].batch_select_indices(index)
    for name, value in found.items():
        if isinstance(value, torch.Tensor):
            found[name] = rows_of(value, rows)
    return found
