"""From how many tokens on an expert in host memory is loaded onto an accelerator,
rather than computed by the CPU where it lies. Pure.

The CPU reads its weights, multiplies, and the hidden states of the tokens move to host
memory and back. The link carries its weights once, whatever the number of tokens.
"""

from dataclasses import dataclass

from ...io.tier import Tier
from .load_cost import load_seconds
from .rates import Curve, Rates
from .shape import UnitCost

_MOST_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class HostRates:
    """The rates of the CPU beside an accelerator."""

    matmul_flops: Curve
    """FLOPs per second of matrix products, by the number of rows."""
    memory_bytes: float
    """Bytes per second that the CPU reads of host memory."""


@dataclass(frozen=True, slots=True)
class ExpertUnit:
    """Experts that are loaded together from host memory."""

    unit: UnitCost
    num_experts: int
    hidden_bytes: int
    """Bytes of a token's hidden state."""
    itemsize: int
    """Bytes of an element of the weights in the dtype of computing."""
    kept: int | None = None
    """Bytes in host memory, if they are kept there as they are stored, and decoded for
    each use; else None."""

    def load_seconds(self, rates: Rates) -> float:
        """Seconds to load it."""
        return load_seconds(self.unit, Tier.HOST, rates, self.kept)

    def host_seconds(self, num_tokens: float, rates: Rates, host: HostRates) -> float:
        """Seconds in which the CPU computes each of its experts for `num_tokens`."""
        nbytes = self.unit.nbytes
        flops = 2.0 * nbytes / self.itemsize * num_tokens
        reading = nbytes / host.memory_bytes
        seconds = max(flops / host.matmul_flops.at(num_tokens), reading)
        if self.kept is not None:
            seconds += rates.cast_like(self.unit.decoded) / rates.cast_bytes
        moved = self.num_experts * num_tokens * self.hidden_bytes
        return seconds + moved / rates.out_bytes + moved / rates.links[Tier.HOST]


def least_tokens(unit: ExpertUnit, rates: Rates, host: HostRates) -> int:
    """How many tokens have to choose each expert of `unit`, on average, so that loading
    it takes no longer than computing it on the CPU. 1 if the CPU is always slower."""

    def is_loaded(num_tokens: int) -> bool:
        return unit.host_seconds(num_tokens, rates, host) >= unit.load_seconds(rates)

    most = 1
    while most < _MOST_TOKENS and not is_loaded(most):
        most *= 2
    least = most // 2 + 1
    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if is_loaded(middle) else (middle + 1, most)
    return most
