"""Plans for ranks that share a model: they divide its blocks among themselves (`ranks:
pipeline`), or what is read (`ranks: gather`)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...io.errors import UsageError
from ...scheduler.cost.ranked_model import RankedModel
from ...scheduler.cost.ranked_pass import Messages, RankStep
from ...scheduler.cost.shape import ModelShape
from ...scheduler.cost.workload import Generating, Prediction, Scoring, predict
from ..machines.machine import Machine
from ..machines.part_machine import part_of
from ..policy import Policy
from ..ranks.share import share_of
from ..weights.blueprint import blueprint
from .forecast import Forecast
from .planned import Choice, Workload
from .planner import Objective, Planner

MESSAGE_SECONDS = 3e-4
"""From a block's end to its output's arrival on another rank: an estimate, of TCP."""
STUB_SECONDS = 1e-4
"""Time of a rank in a call of another rank's block: hooks, checks and switches. An
estimate."""
_NETWORK = 1.25e9
"""Bytes per second between machines where their file says nothing: 10 Gbit/s."""
_COPIES = 8
"""Bytes that memory moves for each byte between processes of one machine."""


@dataclass(frozen=True, slots=True)
class RankGroup:
    """The ranks that share a model, equally many on each of some machines."""

    num: int
    num_nodes: int = 1

    def __post_init__(self) -> None:
        if self.num < 1 or self.num_nodes < 1 or self.num % self.num_nodes:
            raise UsageError(
                f"{self.num} ranks on {self.num_nodes} machines: give each machine the "
                "same number of ranks, at least one"
            )

    @property
    def num_local(self) -> int:
        """The ranks of one machine."""
        return self.num // self.num_nodes


@dataclass(frozen=True, kw_only=True)
class SharedPlanner(Planner):
    """A planner for ranks. Its own model and machine are what the first rank has of
    them; a choice's forecast is of that rank, its prediction of all ranks together."""

    group: RankGroup
    whole: Planner
    """Plans for one process that has all of the model and of its machine."""


@dataclass(frozen=True, kw_only=True)
class GatheringPlanner(SharedPlanner):
    """Plans for ranks that each compute all blocks, for rows of their own, and read
    1/n of the weights, which they send to each other."""

    def predicted(
        self, policy: Policy, found: Forecast, work: Scoring | Generating
    ) -> Prediction:
        one, num = predict(found.model, work), self.group.num
        return replace(
            one, tokens=num * one.tokens, output_tokens=num * one.output_tokens
        )


@dataclass(frozen=True, kw_only=True)
class RankedPlanner(SharedPlanner):
    """Plans for ranks that each have blocks of their own."""

    other: Planner
    """Plans for the rank with the most blocks among all but the first."""
    owners: tuple[int, ...]
    """The rank of each block."""
    blocks: tuple[str, ...]
    """The names of the blocks."""

    def model_of(self, policy: Policy, found: Forecast) -> RankedModel:
        """What passes cost under `policy`, of which `found` is the first rank's
        forecast. Raises DoesNotFitError where another rank has too little memory."""
        other = self.other.forecast_for(policy)
        models = (found.model, other.model)
        steps = steps_of(found.shape, other.shape, self.owners, self.blocks)
        return RankedModel(models, steps, messages_of(self.whole.machine, self.group))

    def predicted(
        self, policy: Policy, found: Forecast, work: Scoring | Generating
    ) -> Prediction:
        return predict(self.model_of(policy, found), work)

    def flops_per_token(self, choice: Choice) -> float:
        return self.model_of(choice.policy, choice.forecast).flops_per_token


def ranked_planner(model: Path, whole: Planner, group: RankGroup) -> RankedPlanner:
    """The planner for the ranks of `group`, which share the checkpoint `model` that
    `whole` plans for. Raises UsageError for a model that they cannot share."""
    policy, machine = alone(whole.policy), part_of(whole.machine, group.num_local)
    planners = []
    owners: tuple[int, ...] = ()
    blocks: tuple[str, ...] = ()
    for rank in (0, None):
        made, _ = blueprint(
            model, policy.dtype, trust_remote_code=policy.trust_remote_code
        )
        share = share_of(
            made.model,
            made.recipes,
            gather_rows=policy.gather_rows,
            rank=_fullest(owners) if rank is None else rank,
            num_ranks=group.num,
        )
        if rank == 0:
            first, last = 1, share.stages.last_block
            owners = share.stages.owners[first : last + 1]
            names = {id(part): name for name, part in made.model.named_modules()}
            blocks = tuple(names[id(block)] for block in share.modules.blocks)
        planners.append(
            Planner(
                made.model,
                share.recipes,
                machine,
                policy,
                *asked_of(whole),
            )
        )
    own, other = planners
    return RankedPlanner(
        own.module,
        own.recipes,
        machine,
        policy,
        *asked_of(whole),
        group=group,
        whole=whole,
        other=other,
        owners=owners,
        blocks=blocks,
    )


def gathering_planner(whole: Planner, group: RankGroup) -> GatheringPlanner:
    """The planner for the ranks of `group`, each of which gets weights over `num` links
    together, or as fast as the network brings the parts of the others."""
    policy, num = alone(whole.policy), group.num
    machine = part_of(whole.machine, group.num_local)
    others = messages_of(whole.machine, group).bytes_per_second * num / (num - 1)
    disk = machine.disk
    if disk is not None:
        rates = {
            reader: int(min(num * rate, others))
            for reader, rate in disk.bandwidth.items()
        }
        disk = disk.model_copy(update={"bandwidth": rates})
    links = {
        tier: link.model_copy(update={"bandwidth": num * link.bandwidth})
        for tier, link in policy.links.items()
    }
    values = policy.model_dump(exclude_unset=True)
    if links:
        values["links"] = {tier: link.model_dump() for tier, link in links.items()}
    return GatheringPlanner(
        whole.module,
        whole.recipes,
        machine.model_copy(update={"disk": disk}),
        Policy(**values),
        *asked_of(whole),
        group=group,
        whole=whole,
    )


def asked_of(whole: Planner) -> tuple[Workload, Objective, bool]:
    """What `whole` plans for, and so do planners for ranks."""
    return whole.workload, whole.objective, whole.is_sparing


def alone(policy: Policy) -> Policy:
    """`policy` of a process that shares no model."""
    if policy.ranks is None:
        return policy
    values = policy.model_dump(exclude_unset=True)
    return Policy(**{key: value for key, value in values.items() if key != "ranks"})


def steps_of(
    first: ModelShape, other: ModelShape, owners: Sequence[int], blocks: Sequence[str]
) -> tuple[RankStep, ...]:
    """Who computes what in a forward: sites of the `first` rank and of an`other` one,
    which stands for all but the first. Pure."""
    before, own, after = _by_block(first, blocks)
    others = _by_block(other, blocks)[1]
    steps = [RankStep(0, 0, before)] if before else []
    nth = dict.fromkeys(owners, 0)
    for rank in owners:
        groups = others if rank else own
        sites = groups[min(nth[rank], len(groups) - 1)]
        steps.append(RankStep(rank, min(rank, 1), sites))
        nth[rank] += 1
    return (*steps, RankStep(0, 0, after)) if after else tuple(steps)


def messages_of(machine: Machine, group: RankGroup) -> Messages:
    """What messages between ranks on machines like this one take."""
    network = machine.network_bandwidth
    if group.num_nodes == 1 and not machine.is_accelerated:
        network = (machine.host_bandwidth or _COPIES * int(_NETWORK)) // _COPIES
    return Messages(float(network or _NETWORK), MESSAGE_SECONDS, STUB_SECONDS)


def _fullest(owners: Sequence[int]) -> int:
    """The rank with the most blocks among all but the first."""
    return max(range(1, max(owners) + 1), key=list(owners).count)


def _by_block(
    shape: ModelShape, blocks: Sequence[str]
) -> tuple[tuple[int, ...], list[tuple[int, ...]], tuple[int, ...]]:
    """The sites of `shape`: those before its blocks, those of each, those after."""
    before: list[int] = []
    after: list[int] = []
    inside: dict[str, list[int]] = {}
    for site, cost in enumerate(shape.sites):
        block = next(
            (b for b in blocks if cost.name == b or cost.name.startswith(f"{b}.")), None
        )
        if block is not None:
            inside.setdefault(block, []).append(site)
        elif inside:
            after.append(site)
        else:
            before.append(site)
    return tuple(before), [tuple(sites) for sites in inside.values()], tuple(after)
