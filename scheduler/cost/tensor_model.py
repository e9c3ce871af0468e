"""The time of passes of one model whose matrix products several ranks divide. Pure.

Each rank computes its rows of every product for all tokens. Then it sends them to the
others, and waits for theirs: once for each divided product of each micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .model import CostModel
from .pipeline import PassCost, PassWork
from .ranked_pass import RANKS, Messages
from .rates import Rates
from .shape import MicroBatchShape, total_tokens
from .site_loads import runs


@dataclass(frozen=True, slots=True)
class SiteGathers:
    """What ranks send each other at one site."""

    num: int = 0
    """The divided products: each has an output to put together, in each
    micro-batch."""
    bytes_per_token: float = 0.0
    """Bytes of these outputs that a rank gets from the others."""


@dataclass(frozen=True, slots=True)
class TensorModel:
    """The time that passes of a model take on ranks which divide its products."""

    each: CostModel
    """What one rank has of the model and of its machine."""
    gathers: tuple[SiteGathers, ...]
    """What is sent at each site."""
    messages: Messages
    flops_elsewhere: float
    """FLOPs for each token that only other ranks compute."""

    @property
    def rates(self) -> Rates:
        return self.each.rates

    @property
    def flops_per_token(self) -> float:
        """FLOPs of products with weights, of all ranks together: what all of them
        compute counts once."""
        return self.each.shape.flops_per_token + self.flops_elsewhere

    def scoring(self, batches: Sequence[MicroBatchShape]) -> PassCost:
        """As `CostModel.scoring`."""
        work = self.each.scoring_work(batches)
        return self._cost(work, len(batches), total_tokens(batches))

    def prefill(
        self, batches: Sequence[MicroBatchShape], context: float = 0.0
    ) -> PassCost:
        """As `CostModel.prefill`."""
        work = self.each.prefill_work(batches, context)
        return self._cost(work, len(batches), total_tokens(batches))

    def decode(self, batches: Sequence[MicroBatchShape], context: float) -> PassCost:
        """As `CostModel.decode`."""
        work = self.each.decode_work(batches, context)
        return self._cost(work, len(batches), sum(batch.rows for batch in batches))

    def gather_seconds(self, num: int, num_tokens: int) -> list[float]:
        """Seconds that `num` micro-batches of `num_tokens` together wait for the rows
        of others, by site."""
        messages, settings = self.messages, self.each.settings
        return [
            num * one.num * messages.seconds
            + num_tokens * one.bytes_per_token / messages.bytes_per_second
            if runs(site, settings)
            else 0.0
            for site, one in zip(self.each.shape.sites, self.gathers, strict=True)
        ]

    def _cost(self, work: PassWork, num: int, num_tokens: int) -> PassCost:
        waits = self.gather_seconds(num, num_tokens)
        waiting = replace(
            work,
            compute=[*map(sum, zip(work.compute, waits, strict=True))],
            first_compute=[*map(sum, zip(work.first_compute, waits, strict=True))],
        )
        cost, total = waiting.cost(), sum(waits)
        time = replace(
            cost.time,
            wait=cost.time.wait + total,
            busy={**cost.time.busy, RANKS: total},
        )
        return PassCost(time, cost.compute_seconds - total, cost.outside_seconds)
