"""How many rows or tokens a task takes at a time to pack them together. Pure."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..policy import Policy

_POOL_MICRO_BATCHES = 16
"""The least number of micro-batches that are packed together: the more, the better
their lengths match."""
LAZY_ROWS = 4096
"""Rows of a part where no job has cut them. Results of failed rows wait for its end."""


def micro_batches_in_flight(policy: "Policy") -> int:
    """How many micro-batches share a pass, of tasks that count tokens."""
    return max(1, policy.tokens_in_flight // policy.micro_batch_tokens)


def tokens_pooled(policy: "Policy") -> int:
    """How many tokens are packed together into micro-batches."""
    width = micro_batches_in_flight(policy)
    return policy.micro_batch_tokens * max(_POOL_MICRO_BATCHES, 2 * width)


def prompts_pooled(policy: "Policy") -> int:
    """How many prompts are packed together into micro-batches."""
    in_flight = policy.sequences_in_flight
    each = min(policy.micro_batch_sequences, in_flight)
    return max(each * _POOL_MICRO_BATCHES, in_flight)
