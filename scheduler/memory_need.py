"""What a job keeps in memory beside its weights. Pure."""

from dataclasses import dataclass

from .shape import ModelShape

RUNTIME_BYTES = 500 << 20
"""Python, torch and transformers with their heaps (measured on the 3B model of the
log: 579 MiB beside the working set, activations among them)."""
_HELD_PER_TOKEN = 3
"""Hidden states of one suspended token: its own, a residual, and what is allocated
anew while the old one still lives."""
_ROW_BYTES = 64 << 10
"""A row's stack, frames and masks."""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes, by where they are."""

    activations: int
    """Of all who are in flight, and of the one that computes."""
    kv: int


def scoring_need(
    shape: ModelShape, tokens_in_flight: int, micro_batch_tokens: int, logits: int
) -> Need:
    """Of scoring so many tokens at a time."""
    held = tokens_in_flight * shape.hidden * shape.itemsize * _HELD_PER_TOKEN
    return Need(held + logits + _workspace(shape, micro_batch_tokens), 0)


def generating_need(
    shape: ModelShape, sequences: int, prompt_tokens: int, new_tokens: int, each: int
) -> Need:
    """Of completing so many sequences at a time, `each` in a micro-batch."""
    held = sequences * prompt_tokens * shape.hidden * shape.itemsize
    held += sequences * _ROW_BYTES + sequences * shape.vocabulary * 4
    kv = sequences * (prompt_tokens + new_tokens) * shape.kv_bytes_per_token
    return Need(held + _workspace(shape, each * prompt_tokens), kv)


def _workspace(shape: ModelShape, tokens: int) -> int:
    """Of the block that computes: what its operations touch exists for a while, at
    most about half of it at one time."""
    touched = max((site.pointwise_per_token for site in shape.sites), default=0.0)
    return int(tokens * touched * shape.itemsize / 4)
