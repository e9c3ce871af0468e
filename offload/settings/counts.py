"""The counts of a policy that nobody has said. Pure."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ..policy import Policy


class ShareOfFlight(NamedTuple):
    """What a micro-batch may have of all that is in flight, unless told."""

    whole: str
    divisor: int
    """Of what is in flight, at most this part ..."""
    enough: int
    """... but so many are no matter what part they are."""


PARTS = {
    "micro_batch_tokens": ShareOfFlight("tokens_in_flight", divisor=1, enough=0),
    # Others come when there are as many places as they need: in quarters.
    "micro_batch_sequences": ShareOfFlight("sequences_in_flight", divisor=4, enough=8),
}
COUNTS = frozenset({"lookahead", *PARTS, *(part.whole for part in PARTS.values())})


def without_auto(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` of a policy without the counts that are `auto`: those are what they
    would be without the key, and are not among the policy's `model_fields_set`."""
    return {
        key: value
        for key, value in values.items()
        if not (key in COUNTS and value == "auto")
    }


def open_counts(policy: "Policy") -> dict[str, int]:
    """Counts that were left open follow from those that were said: a micro-batch is no
    more than its part of what is in flight."""
    found = {}
    for name, (whole, divisor, enough) in PARTS.items():
        own, most = getattr(policy, name), getattr(policy, whole)
        if name not in policy.model_fields_set:
            found[name] = min(own, most, max(enough, most // divisor))
        elif own > most and whole not in policy.model_fields_set:
            found[whole] = own
    return found
