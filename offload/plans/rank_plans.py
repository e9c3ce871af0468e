"""The ways in which ranks share a model: their planners, what they say of a plan, and
for which passes `ranks: tensor` is faster than `ranks: gather`."""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...scheduler.cost.pipeline import PassCost
from ...scheduler.cost.shape import MicroBatchShape, split_rows
from ...scheduler.cost.switch import Seconds, Switch, switch_of
from ...scheduler.cost.workload import PassModel
from ..monitoring.show import human_bytes
from ..policy import Policy
from .forecast import Forecast, generating_of
from .planned import Choice
from .planner import Planner
from .ranked import (
    GatheringPlanner,
    RankedPlanner,
    RankGroup,
    SharedPlanner,
    gathering_planner,
    ranked_planner,
)
from .tensor_ranked import TensorPlanner, tensor_planner


def shared_planner(
    model: Path, whole: Planner, group: RankGroup, mode: str
) -> SharedPlanner:
    """The planner for ranks that share the checkpoint `model` as `ranks: mode` says.
    Raises UsageError for a model that cannot be shared so."""
    if mode == "gather":
        return gathering_planner(whole, group)
    if mode == "tensor":
        return tensor_planner(model, whole, group)
    return ranked_planner(model, whole, group)


@dataclass(frozen=True, slots=True)
class PassKind:
    """One kind of pass of a workload."""

    name: str
    """Its name in sentences."""
    length: int
    """The most tokens of each row in a micro-batch."""
    each: int
    """The rows of a micro-batch."""
    context: float | None = None
    """The tokens before the one of each row, of a pass that generates; else None."""
    prefills: bool = False

    def seconds(self, model: PassModel, num_tokens: int) -> float:
        """The seconds of a pass of `num_tokens` in the middle of a job."""
        return self._cost(model, max(1, num_tokens)).steady

    def _cost(self, model: PassModel, num_tokens: int) -> PassCost:
        if num_tokens < self.length:
            batches = [MicroBatchShape(1, num_tokens)]
        else:
            batches = split_rows(-(-num_tokens // self.length), self.each, self.length)
        if self.context is not None:
            return model.decode(batches, self.context)
        return model.prefill(batches) if self.prefills else model.scoring(batches)


@dataclass(frozen=True, slots=True)
class PassSwitch:
    """For how many tokens a pass `ranks: tensor` is faster than `ranks: gather`, for
    one kind of pass."""

    passes: str
    switch: Switch
    num_tokens: int
    """The tokens of such a pass of the plan, over all ranks."""
    faster: str
    """The faster one for these."""

    @property
    def sentence(self) -> str:
        least, most = self.switch.least, self.switch.most
        says = "tensor is faster than gather, however many tokens a pass has"
        if most == 0:
            says = "gather is faster than tensor, however few tokens a pass has"
        elif most is not None and least > 1:
            says = (
                f"tensor is faster from {least:,} to {most:,} tokens a pass, gather "
                "below and above"
            )
        elif most is not None:
            says = f"tensor is faster up to {most:,} tokens a pass, gather above"
        elif least > 1:
            says = f"tensor is faster from {least:,} tokens a pass on, gather below"
        return (
            f"ranks: {says}; the {self.passes} of this plan have {self.num_tokens:,}: "
            f"{self.faster}"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "passes": self.passes,
            "tensor_from_tokens": self.switch.least,
            "tensor_up_to_tokens": self.switch.most,
            "tokens_in_pass": self.num_tokens,
            "faster": self.faster,
        }


def pass_kinds(planner: Planner, policy: Policy, found: Forecast) -> list[PassKind]:
    """The kinds of passes of the planner's workload under `policy`."""
    task, length = planner.task, planner.workload.row_tokens
    if not task.keeps_kv:
        rows = max(1, policy.micro_batch_tokens // length)
        return [PassKind("passes", length, rows)]
    work = generating_of(
        policy,
        policy.sequences_in_flight,
        length,
        task.new_tokens,
        in_parts=found.shape.prompts_in_parts,
    )
    middle = length + task.new_tokens / 2
    return [
        PassKind("prompt passes", work.chunks[0], work.each, prefills=True),
        PassKind("token passes", 1, work.each, middle),
    ]


@dataclass(frozen=True, slots=True)
class TwoWays:
    """The seconds of one kind of pass on ranks that divide products, and on ones that
    gather weights."""

    name: str
    length: int
    """The most tokens of each row in a pass."""
    tensor: Seconds
    gather: Seconds

    @property
    def switch(self) -> Switch:
        return switch_of(("tensor", self.tensor), ("gather", self.gather))

    def faster(self, num_tokens: int) -> str:
        """The faster one for passes of `num_tokens`."""
        is_few = self.tensor(num_tokens) <= self.gather(num_tokens)
        return "tensor" if is_few else "gather"


def two_ways(
    tensor: tuple[TensorPlanner, Policy, Forecast],
    gather: tuple[GatheringPlanner, Policy, Forecast],
) -> list[TwoWays]:
    """Both ways for each kind of pass of a workload. A planner comes with the policy
    that it is compared by, and its forecast."""
    num = gather[0].group.num
    model, whole = tensor[0].model_of(*tensor[1:]), gather[2].model
    return [
        TwoWays(
            one.name,
            one.length,
            partial(one.seconds, model),
            partial(_seconds_of_each, other, whole, num),
        )
        for one, other in zip(pass_kinds(*tensor), pass_kinds(*gather), strict=True)
    ]


def pass_switches(
    tensor: tuple[TensorPlanner, Choice],
    gather: tuple[GatheringPlanner, Choice],
    here: tuple[Planner, Choice],
) -> tuple[PassSwitch, ...]:
    """For each kind of pass, the switch between two choices, and on which side of it
    the plan `here` is."""
    planner, policy = here[0], here[1].policy
    times = planner.group.num if isinstance(planner, GatheringPlanner) else 1
    found = []
    for ways in two_ways(
        (tensor[0], tensor[1].policy, tensor[1].forecast),
        (gather[0], gather[1].policy, gather[1].forecast),
    ):
        num = times * policy.tokens_in_flight
        if planner.task.keeps_kv:
            num = times * policy.sequences_in_flight * ways.length
        found.append(PassSwitch(ways.name, ways.switch, num, ways.faster(num)))
    return tuple(found)


def _seconds_of_each(
    kind: PassKind, model: PassModel, num_ranks: int, num_tokens: int
) -> float:
    """The seconds of a pass of `num_tokens` of which each rank has a part."""
    return kind.seconds(model, -(-num_tokens // num_ranks))


def rank_sentences(planner: Planner, choice: Choice) -> list[str]:
    """A sentence for what ranks share and send; none for one process."""
    if isinstance(planner, GatheringPlanner):
        num = planner.group.num
        return [
            f"{num} ranks read 1/{num} of the weights each, and get the rest from the "
            "others; each has rows of its own, and what is in flight is for each"
        ]
    if isinstance(planner, TensorPlanner):
        return [_tensor_sentence(planner, choice)]
    if not isinstance(planner, RankedPlanner):
        return []
    group, shape = planner.group, choice.forecast.shape
    task, owners = planner.task, planner.owners
    tokens = task.in_flight(choice.policy)
    each = task.micro_batch_key
    num = max(1, tokens // int(getattr(choice.policy, each)))
    hops = sum(a != b for a, b in pairwise(owners))
    nbytes = tokens * shape.hidden * shape.itemsize * hops
    dealt = " + ".join(f"{owners.count(rank)}" for rank in range(group.num))
    found = [
        f"{group.num} ranks share the model: {dealt} of its {len(owners)} blocks; in a "
        f"pass they send {human_bytes(nbytes)} of hidden states; sizes of memory are "
        "for each rank"
    ]
    if num < group.num:
        found.append(
            f"{num} micro-batches for {group.num} ranks: some wait; set {each} lower, "
            f"or {task.in_flight_key} higher"
        )
    return found


def _tensor_sentence(planner: TensorPlanner, choice: Choice) -> str:
    num, cut = planner.group.num, planner.cut
    policy, task = choice.policy, planner.task
    tokens = task.in_flight(policy)
    times = -(-tokens // max(1, int(getattr(policy, task.micro_batch_key))))
    nbytes = tokens * planner.output_bytes_per_token * (num - 1) // num
    num_cut = len(cut.layers) + len(cut.experts)
    experts = f" and of the experts of {len(cut.experts)} layers" if cut.experts else ""
    says = (
        f"{num} ranks compute all rows together, and 1/{num} of each of "
        f"{len(cut.layers)} products{experts}; in a pass each sends "
        f"{human_bytes(nbytes)} of their outputs, in {times * num_cut:,} messages to "
        "each other rank; "
        "sizes of memory are for each rank"
    )
    if cut.whole_bytes > cut.block_bytes // 20:
        says += (
            f"; each computes all of {human_bytes(cut.whole_bytes)} of the blocks' "
            f"{human_bytes(cut.block_bytes)}, which are not divided"
        )
    return says
