"""The seconds of parts of a site. Pure."""

from dataclasses import dataclass

from .rates import Rates
from .shape import ModelShape, SiteCost

_TOUCHES = 3
"""How often each temporary key and value is written or read, until attention has read
it."""


@dataclass(frozen=True, slots=True)
class SiteCalls:
    """How the tokens of a pass come to the matrix products of a site."""

    tokens: float
    """All of them together."""
    rows: float
    """Those of one product, which may be of several micro-batches."""
    own_rows: float
    """Those of one micro-batch: products with experts are never joined."""


def product_seconds(rates: Rates, site: SiteCost, calls: SiteCalls) -> float:
    """Seconds of the matrix products with weights. A product with an expert has only
    the rows that are sent to it, and reads only the experts that are hit."""
    if not calls.tokens or not calls.rows:
        return 0.0
    dense_flops = site.flops_per_token - site.expert_flops_per_token
    dense_bytes = site.weight_bytes - site.expert_weight_bytes
    seconds = rates.matmul_seconds(
        dense_flops * calls.tokens,
        calls.rows,
        dense_bytes * calls.tokens / max(calls.rows, 1.0),
    )
    if not site.expert_flops_per_token:
        return seconds
    times = calls.tokens / calls.own_rows
    return seconds + rates.matmul_seconds(
        site.expert_flops_per_token * calls.tokens,
        calls.own_rows * site.expert_share,
        site.expert_weight_bytes * times * site.hit_share(calls.own_rows),
    )


def expansion_seconds(
    rates: Rates, site: SiteCost, num_rows: float, context: float, itemsize: int
) -> float:
    """Seconds to make keys and values of what is kept of `num_rows` sequences of
    `context` tokens."""
    if not site.expanded_flops:
        return 0.0
    tokens = num_rows * site.context(context)
    flops = tokens * site.expanded_flops
    nbytes = tokens * site.expanded_per_token * itemsize * _TOUCHES
    return rates.matmul_seconds(flops, tokens, 0.0) + nbytes / rates.device_bytes


def gather_seconds(rates: Rates, shape: ModelShape, num_tokens: int) -> float:
    """Seconds to read the embedding rows of `num_tokens`, each distinct one once."""
    if not shape.gathers_rows:
        return 0.0
    vocabulary = max(1, shape.vocabulary)
    distinct = vocabulary * (1.0 - (1.0 - 1.0 / vocabulary) ** num_tokens)
    return distinct * rates.calls.row_read
