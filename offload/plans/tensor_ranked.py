"""Plans for ranks that divide the matrix products of a model (`ranks: tensor`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ...scheduler.cost.partitioning import output_crossover_tokens
from ...scheduler.cost.shape import ModelShape
from ...scheduler.cost.tensor_model import SiteGathers, TensorModel
from ...scheduler.cost.workload import Generating, Prediction, Scoring, predict
from ..machines.part_machine import part_of
from ..policy import Policy
from ..tensor_ranks.cut_experts import CutExperts
from ..tensor_ranks.cut_layers import CutLayer, CutLayers, cut_layers
from ..traces.model_cache import ModelCache, model_cache
from ..units.describe import TOUCHES_OF_PRODUCT, active_share
from ..units.expert_probe import num_dense_experts
from ..weights.blueprint import blueprint
from .forecast import Forecast, Forecaster
from .planned import Choice
from .planner import Planner
from .ranked import RankGroup, SharedPlanner, alone, asked_of, messages_of


@dataclass(frozen=True, kw_only=True)
class TensorPlanner(SharedPlanner):
    """Plans for ranks that compute all micro-batches together, and 1/n of the rows of
    each product. Its model is that of the rank with the most rows."""

    cut: CutLayers
    """What that rank has of the model."""
    cache: ModelCache
    """What the model keeps of each token, on every rank."""

    @cached_property
    def _forecaster(self) -> Forecaster:
        return Forecaster(
            self.module,
            self.recipes,
            self.machine,
            self.task,
            cache=self.cache,
            adjusted=lambda shape: with_whole_outputs(shape, self.cut.layers),
        )

    def model_of(self, policy: Policy, found: Forecast) -> TensorModel:
        """What passes cost under `policy`, of which `found` is the forecast."""
        return TensorModel(
            found.model,
            gathers_of(found.shape, self.cut.layers, self._expert_gathers),
            messages_of(self.whole.machine, self.group),
            2.0 * sum(map(_elements_elsewhere, self.cut.layers))
            + sum(one.flops_elsewhere for one in self._expert_gathers),
        )

    @cached_property
    def _expert_gathers(self) -> list["ExpertGathers"]:
        itemsize = next(iter(self.recipes.values())).dtype.itemsize
        return expert_gathers(self.module.config, self.cut.experts, itemsize)

    def predicted(
        self, policy: Policy, found: Forecast, work: Scoring | Generating
    ) -> Prediction:
        return predict(self.model_of(policy, found), work)

    def flops_per_token(self, choice: Choice) -> float:
        return self.model_of(choice.policy, choice.forecast).flops_per_token

    @property
    def output_bytes_per_token(self) -> int:
        """Bytes of the divided outputs of one token, those of all ranks together."""
        found = sum(_num_outputs(one) * _itemsize(one) for one in self.cut.layers)
        return found + round(sum(one.bytes_per_token for one in self._expert_gathers))

    @property
    def crossover_tokens(self) -> float:
        """The tokens a pass above which `ranks: gather` moves fewer bytes, by its
        formula."""
        return output_crossover_tokens(
            self.cut.block_bytes, self.output_bytes_per_token
        )


def tensor_planner(model: Path, whole: Planner, group: RankGroup) -> TensorPlanner:
    """The planner for the ranks of `group`, which share the checkpoint `model` that
    `whole` plans for. Raises UsageError for a model that they cannot divide."""
    policy, machine = alone(whole.policy), part_of(whole.machine, group.num_local)
    made, _ = blueprint(model, policy.dtype, trust_remote_code=policy.trust_remote_code)
    cache = model_cache(made.model)  # its modules have all rows so far
    cut = cut_layers(made.model, made.recipes, rank=group.num - 1, num_ranks=group.num)
    return TensorPlanner(
        made.model,
        cut.recipes,
        machine,
        policy,
        *asked_of(whole),
        group=group,
        whole=whole,
        cut=cut,
        cache=cache,
    )


def with_whole_outputs(shape: ModelShape, layers: Sequence[CutLayer]) -> ModelShape:
    """`shape`, which has the products of one rank, with the operations between them:
    each rank computes those for all rows. Pure."""
    sites = [*shape.sites]
    indices = _indices(shape)
    for layer in layers:
        if layer.is_by_columns:  # it is described by its inputs, which are whole
            continue
        index = _site_of(layer.name, indices)
        more = TOUCHES_OF_PRODUCT * (_num_outputs(layer) - _num_own(layer))
        each = sites[index].pointwise_per_token + more
        sites[index] = replace(sites[index], pointwise_per_token=each)
    return replace(shape, sites=tuple(sites))


@dataclass(frozen=True, slots=True)
class ExpertGathers:
    """What one module of experts, of which each rank has a range, makes for a token."""

    name: str
    bytes_per_token: float
    """Bytes of the outputs of the experts that a token is sent to."""
    from_others: float
    """The share (0 to 1) of them that other ranks compute."""
    flops_elsewhere: float
    """FLOPs for each token that only other ranks compute."""


def expert_gathers(
    config: Any, experts: Sequence[CutExperts], itemsize: int
) -> list[ExpertGathers]:
    """What ranks that divide the `experts` of a model with this `config` send each
    other of them."""
    text = config.get_text_config()
    share, width = active_share(text), text.hidden_size
    takes_all: dict[type, bool] = {}
    found = []
    for one in experts:
        kind = type(one.module)
        if kind not in takes_all:
            takes_all[kind] = num_dense_experts(one.module) is not None
        active = 1.0 if takes_all[kind] else share
        pairs = one.num_experts * active
        low, high = one.bounds[-1]
        own = sum(p.numel() for p in one.module.parameters() if p.dim() == 3)
        elsewhere = 2.0 * own * active * (one.num_experts / one.num_held - 1.0)
        from_others = 1.0 - (high - low) / one.num_experts
        nbytes = pairs * width * itemsize
        found.append(ExpertGathers(one.name, nbytes, from_others, elsewhere))
    return found


def gathers_of(
    shape: ModelShape,
    layers: Sequence[CutLayer],
    experts: Sequence[ExpertGathers] = (),
) -> tuple[SiteGathers, ...]:
    """What ranks send each other at each site of `shape`. Pure."""
    found = [SiteGathers()] * len(shape.sites)
    indices = _indices(shape)
    for layer in layers:
        index = _site_of(layer.name, indices)
        least = min(high - low for low, high in layer.bounds)
        nbytes = (_num_outputs(layer) - least) * _itemsize(layer)
        before = found[index]
        found[index] = SiteGathers(before.num + 1, before.bytes_per_token + nbytes)
    for one in experts:
        before = found[index := _site_of(one.name, indices)]
        more = one.bytes_per_token * one.from_others
        found[index] = SiteGathers(before.num + 1, before.bytes_per_token + more)
    return tuple(found)


def _indices(shape: ModelShape) -> dict[str, int]:
    return {site.name: index for index, site in enumerate(shape.sites)}


def _site_of(name: str, indices: Mapping[str, int]) -> int:
    """The site that the module `name` is in."""
    while name and name not in indices:
        name = name.rpartition(".")[0]
    return indices.get(name, 0)


def _num_outputs(layer: CutLayer) -> int:
    return layer.bounds[-1][1]


def _num_own(layer: CutLayer) -> int:
    """The rows of the rank that is planned for: the last one, which has the most."""
    low, high = layer.bounds[-1]
    return high - low


def _itemsize(layer: CutLayer) -> int:
    return layer.recipes[f"{layer.name}.weight"].dtype.itemsize


def _elements_elsewhere(layer: CutLayer) -> float:
    """The elements of the weight that only other ranks have."""
    own = layer.module.get_parameter("weight").numel()
    return own * (_num_outputs(layer) / _num_own(layer) - 1.0)
