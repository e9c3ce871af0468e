"""Chooses the counts of a policy that the user has not set. Pure."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ..policy import Policy


class ShareOfFlight(NamedTuple):
    """The default size of a micro-batch, relative to all that is in flight."""

    whole: str
    """The key that counts all that is in flight."""
    divisor: int
    """A micro-batch has at most 1 / `divisor` of what is in flight ..."""
    enough: int
    """... or this many, if that is more."""


PARTS = {
    "micro_batch_tokens": ShareOfFlight("tokens_in_flight", divisor=1, enough=0),
    # A quarter: a new micro-batch starts once as many sequences have ended as it has.
    "micro_batch_sequences": ShareOfFlight("sequences_in_flight", divisor=4, enough=8),
}
COUNTS = frozenset({"lookahead", *PARTS, *(part.whole for part in PARTS.values())})


def without_auto(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` of a policy without the counts that are `auto`.

    So these are the same as counts that are not set, and not among the policy's
    `model_fields_set`.
    """
    return {
        key: value
        for key, value in values.items()
        if not (key in COUNTS and value == "auto")
    }


def open_counts(policy: "Policy") -> dict[str, int]:
    """The counts that were not set, derived from those that were.

    A micro-batch is no larger than its share of what is in flight.
    """
    found = {}
    for name, (whole, divisor, enough) in PARTS.items():
        own, most = getattr(policy, name), getattr(policy, whole)
        if name not in policy.model_fields_set:
            found[name] = min(own, most, max(enough, most // divisor))
        elif own > most and whole not in policy.model_fields_set:
            found[whole] = own
    return found
