"""The counts of a policy that nobody has said. Pure."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..policy import Policy

PARTS = {
    "micro_batch_tokens": "tokens_in_flight",
    "micro_batch_sequences": "sequences_in_flight",
}
"""What a micro-batch has, and what it is a part of."""
FEW_SEQUENCES = 8
COUNTS = frozenset({"lookahead", *PARTS, *PARTS.values()})


def without_auto(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` of a policy without the counts that are `auto`: those are what they
    would be without the key, and are not among the policy's `model_fields_set`."""
    return {
        key: value
        for key, value in values.items()
        if not (key in COUNTS and value == "auto")
    }


def open_counts(policy: "Policy") -> dict[str, int]:
    """Counts that were left open follow from those that were said: a micro-batch is
    at most what is in flight; of more than a few sequences, a quarter. (Others come
    when there are as many places as they need.)"""
    found = {}
    for part, whole in PARTS.items():
        own, most = getattr(policy, part), getattr(policy, whole)
        if part not in policy.model_fields_set:
            is_tokens = part == "micro_batch_tokens"
            share = most if is_tokens else min(most, max(FEW_SEQUENCES, most // 4))
            found[part] = min(own, share)
        elif own > most and whole not in policy.model_fields_set:
            found[whole] = own
    return found
