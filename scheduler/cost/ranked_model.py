"""The time of passes of one model that several ranks share. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from .model import CostModel
from .pipeline import PassCost, PassWork
from .ranked_pass import Messages, RankStep, ranked_cost
from .rates import Rates
from .shape import MicroBatchShape, total_tokens


@dataclass(frozen=True, slots=True)
class RankedModel:
    """The time that passes of a model take on ranks which deal its blocks."""

    models: tuple[CostModel, ...]
    """What each kind of rank has of the model: first that of the first rank."""
    steps: tuple[RankStep, ...]
    """Who computes what, in the order of a forward."""
    messages: Messages

    @property
    def rates(self) -> Rates:
        return self.models[0].rates

    @property
    def flops_per_token(self) -> float:
        """FLOPs of products with weights, of all ranks together."""
        return sum(
            self.models[step.kind].shape.sites[site].flops_per_token
            for step in self.steps
            for site in step.sites
        )

    def scoring(self, batches: Sequence[MicroBatchShape]) -> PassCost:
        """As `CostModel.scoring`."""
        works = [model.scoring_work(batches) for model in self.models]
        return self._cost(works, len(batches), total_tokens(batches))

    def prefill(
        self, batches: Sequence[MicroBatchShape], context: float = 0.0
    ) -> PassCost:
        """As `CostModel.prefill`."""
        works = [model.prefill_work(batches, context) for model in self.models]
        return self._cost(works, len(batches), total_tokens(batches))

    def decode(self, batches: Sequence[MicroBatchShape], context: float) -> PassCost:
        """As `CostModel.decode`."""
        works = [model.decode_work(batches, context) for model in self.models]
        return self._cost(works, len(batches), sum(batch.rows for batch in batches))

    def _cost(self, works: Sequence[PassWork], num: int, num_tokens: int) -> PassCost:
        shape = self.models[0].shape
        hidden_bytes = num_tokens * shape.hidden * shape.itemsize
        return ranked_cost(
            works, self.steps, self.messages, num=num, hidden_bytes=hidden_bytes
        )
