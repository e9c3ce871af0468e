"""Finds the ways to use several devices, or several ranks: those that Penstock runs,
and what formulas say of one model split over all of them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from ...io.errors import DoesNotFitError, PolicyError, UsageError
from ...io.tier import Tier
from ...scheduler.cost.partitioning import (
    Chips,
    gather_crossover_tokens,
    layout_costs,
)
from ..machines.part_machine import part_of, why_each_reads
from ..policy import Policy
from .devices import DeviceOption, Devices
from .forecast import dtype_of
from .formulas import (
    blocks_of,
    config_of,
    layout_option,
    network_of,
    why_no_formula,
)
from .planned import USABLE, Choice
from .planner import Planner
from .rank_plans import PassSwitch, pass_switches
from .ranked import (
    GatheringPlanner,
    RankedPlanner,
    RankGroup,
    SharedPlanner,
    messages_of,
)
from .rates import peak_flops, rates_of, reader_of
from .tensor_ranked import TensorPlanner

Deal = Callable[[Planner, RankGroup, str], SharedPlanner]
"""Makes the planner for ranks from the one for a process that has the whole model, and
the value of `ranks` in the policy."""
_KINDS: Mapping[str, tuple[type[SharedPlanner], str]] = {
    "pipeline": (RankedPlanner, "has 1/{} of the blocks"),
    "gather": (GatheringPlanner, "reads 1/{}"),
    "tensor": (TensorPlanner, "has 1/{} of each product"),
}
"""The planner for each value of `ranks`, and what each rank does."""
_FORMULA_OF = {"gather": "gather-stream", "tensor": "TP-stream"}
"""The formula of a layout that is planned for."""
_AS_FAST = 0.99
_Made = tuple[SharedPlanner | None, Choice | str]
"""A planner for ranks and its choice, or why there is none."""


def devices_of(
    planner: Planner, choice: Choice, deal: Deal, group: RankGroup | None
) -> Devices | None:
    """The ways to use the ranks of `group`, or the devices of the planner's machine;
    None where it has one device and there are no ranks."""
    whole = planner.whole if isinstance(planner, SharedPlanner) else planner
    machine = whole.machine
    if group is None and (machine.num_devices < 2 or not machine.is_accelerated):
        return None
    found = _Ways(planner, whole, choice, deal, group or RankGroup(machine.num_devices))
    return found.all()


@dataclass(frozen=True, slots=True)
class _Ways:
    """Finds the ways for one plan."""

    planner: Planner
    whole: Planner
    choice: Choice
    deal: Deal
    group: RankGroup

    def all(self) -> Devices:
        made = {mode: self._made(mode) for mode in _KINDS}
        shared = [self._shared(mode, one) for mode, one in made.items() if one]
        ways = [*self._alone(), *self._peers(), self._workers(), *shared]
        tokens = max(way.num_tokens for way in ways)
        note, crossover = why_no_formula(self.whole.module, self.whole.machine), None
        if not note:
            itemsize = self.choice.forecast.shape.itemsize
            flops = self.planner.flops_per_token(self.choice)
            blocks = blocks_of(config_of(self.whole.module), flops)
            chips = self._chips(tokens)
            costs = layout_costs(
                tokens,
                blocks,
                chips,
                link_bandwidth=self._link(blocks.parameters * itemsize),
                itemsize=itemsize,
            )
            known = {_FORMULA_OF.get(way.name) for way in ways}
            left = [cost for cost in costs if cost.name not in known]
            ways += [layout_option(cost, tokens, chips) for cost in left]
            crossover = gather_crossover_tokens(
                blocks.parameters * itemsize / blocks.layers, blocks.hidden, itemsize
            )
            least = 4 * blocks.intermediate / blocks.hidden
            note = (
                "formulas (arXiv 2211.05102) leave out attention, keys and values and "
                "take peak rates; 2D layouts, which Penstock does not run, move less "
                f"than 1D ones from more than {least:.0f} devices on; what Penstock "
                "runs is predicted, and not measured on several GPUs yet"
            )
        ways.sort(key=lambda way: not way.is_run)
        machine, num_nodes = self.whole.machine, self.group.num_nodes
        num = self.group.num if machine.is_accelerated else num_nodes
        price = machine.price_per_hour
        return Devices(
            self.group.num,
            "devices" if machine.is_accelerated else "ranks",
            tuple(ways),
            crossover,
            note,
            self.planner.flops_per_token(self.choice),
            num * peak_flops(machine, self._dtype),
            None if price is None else price * num_nodes,
            self._switches(made["tensor"], made["gather"]),
        )

    @property
    def _dtype(self) -> str:
        """The dtype that the model computes in."""
        return dtype_of(self.whole.recipes)

    def _alone(self) -> Iterator[DeviceOption]:
        name = "one device" if self.whole.machine.is_accelerated else "one process"
        num, choice = self.group.num, self.choice
        note = "this plan" if self.whole.policy.peer else f"this plan; {num - 1} idle"
        if self.planner is not self.whole:
            note = "without ranks"
            try:
                choice = self.whole.choose()
            except DoesNotFitError:
                yield DeviceOption(name, True, "does not fit", 0, None)
                return
        yield self._option(name, note, choice, 1)

    def _peers(self) -> Iterator[DeviceOption]:
        """One device computes, the others keep weights for it. Nothing where the user
        has set peers or the machine is no GPU."""
        whole, machine = self.whole, self.whole.machine
        if whole.policy.peer or machine.device_memory is None:
            return
        nbytes = int(machine.device_memory * USABLE)
        kind = machine.device
        peer = {f"{kind}:{index}": nbytes for index in range(1, machine.num_devices)}
        if not peer:
            return
        name, how = "others keep weights (peer)", "peer"
        try:
            found = whole.under(machine, {"device": f"{kind}:0", "peer": peer}).choose()
        except DoesNotFitError:
            yield DeviceOption(name, True, "does not fit", 0, None, how)
            return
        kept = found.forecast.bytes_by_tier[Tier.PEER]
        note = f"one computes; {kept / 1e9:,.0f} GB of weights on the others"
        yield self._option(name, note, found, 1, how)

    def _workers(self) -> DeviceOption:
        """A job on each device. They share the drive, the host's memory and one copy of
        the weights in it; each has a link of its own. By default they read the drive
        once for all of them."""
        num, local = self.group.num, self.group.num_local
        name, how = f"a job each (--workers {local})", f"--workers {local}"
        if self.group.num_nodes > 1:
            name, how = "a job each", f"{how}, and a part of the rows on each machine"
        policy, is_on_gpu = self.whole.policy, self.whole.machine.is_accelerated
        reader = reader_of(self.whole.machine, policy)
        why = why_each_reads(policy, reader, is_on_gpu=is_on_gpu)
        found = self._work_of_each(reads_once=local > 1 and not why)
        if found is None:
            return DeviceOption(name, True, "does not fit", 0, None, how)
        note = f"{found.prediction.binds} binds"
        if local > 1 and why:
            note += f"; the drive is shared; io.read_once: {why}"
        elif local > 1:
            note += "; the drive is read once for all"
            note += self._if_each_reads(self._option("", "", found, num))
        if is_on_gpu:
            note = f"{note}, host_shared: true"
        return self._option(name, note, found, num, how)

    def _if_each_reads(self, once: DeviceOption) -> str:
        """What to say of workers that each read all weights, if they are slower than
        `once`, of ones that share what they read."""
        found = self._work_of_each(reads_once=False)
        if found is None:
            return ""
        each = self._option("", "", found, self.group.num).tokens_per_second
        if not each or each >= _AS_FAST * (once.tokens_per_second or 0.0):
            return ""
        return f" ({each:,.0f} a second if each reads all: io.read_once: false)"

    def _work_of_each(self, *, reads_once: bool) -> Choice | None:
        """The choice for one of as many workers as there are ranks; None where it does
        not fit."""
        num, machine = self.group.num_local, self.whole.machine
        each = self.whole.under(part_of(machine, num, reads_once=reads_once), {})
        try:
            found = each.choose()
        except DoesNotFitError:
            return None
        if machine.is_accelerated:
            return each.with_shared_host(found, self.group.num) or found
        return found

    def _made(self, mode: str) -> _Made | None:
        """The planner for `ranks: mode`, with its choice or why there is none. None
        where that is not run, and there is a formula instead."""
        if isinstance(self.planner, _KINDS[mode][0]):
            return self.planner, self.choice
        is_refused = self.group.num < 2 or self._refusal(mode)
        if is_refused and mode in _FORMULA_OF:
            return None
        try:
            planner = self.deal(self.whole, self.group, mode)
            return planner, planner.choose()
        except DoesNotFitError:
            return None, "does not fit"
        except UsageError as error:
            return None, f"{error}"

    def _shared(self, mode: str, made: _Made) -> DeviceOption:
        """Ranks that share the model as `ranks: mode` says."""
        (planner, found), how = made, self._how(mode)
        refusal, (_, does) = self._refusal(mode), _KINDS[mode]
        if isinstance(found, str):
            return DeviceOption(mode, not refusal, found, 0, None, how)
        note = f"{found.prediction.binds} binds; each {does.format(self.group.num)}"
        if planner is self.planner:
            note = "this plan"
        note = f"{note}; {refusal}" if refusal else note
        times = self.group.num if isinstance(planner, GatheringPlanner) else 1
        return replace(self._option(mode, note, found, times, how), is_run=not refusal)

    def _switches(
        self, tensor: _Made | None, gather: _Made | None
    ) -> tuple[PassSwitch, ...]:
        """For which passes ranks that divide products are faster than ones that gather
        weights; nothing where they are not both planned for."""
        match tensor, gather:
            case (TensorPlanner(), Choice()), (GatheringPlanner(), Choice()):
                return pass_switches(tensor, gather, (self.planner, self.choice))
        return ()

    def _how(self, mode: str) -> str:
        """What runs `ranks: mode`."""
        num, nodes = self.group.num_local, self.group.num_nodes
        start = f"--ranks {num}"
        if nodes > 1:
            start = f"torchrun --nnodes {nodes} --nproc-per-node {num}"
        return f"ranks: {mode}, {start}"

    def _refusal(self, mode: str) -> str:
        """Why Penstock does not run `ranks: mode` on this machine; "" if it does."""
        values = self.whole.policy.model_dump(exclude_unset=True)
        device = values.get("device", self.whole.machine.device)
        try:
            Policy(**{**values, "device": device, "ranks": mode})
        except PolicyError as error:
            return f"not run here: {error}"
        return ""

    def _option(
        self, name: str, note: str, found: Choice, times: int, how: str = ""
    ) -> DeviceOption:
        tokens = times * self.whole.task.in_flight(found.policy)
        return DeviceOption(
            name, True, note, tokens, found.prediction.pass_seconds, how
        )

    def _chips(self, tokens: int) -> Chips:
        machine, num = self.whole.machine, self.group.num
        part = part_of(machine, self.group.num_local)
        rates = rates_of(part, self.whole.policy, self._dtype)
        network = network_of(machine)
        if network is None:
            network = messages_of(machine, self.group).bytes_per_second
        return Chips(
            num,
            rates.matmul_flops.at(tokens / num),
            float(part.device_memory or part.host_memory),
            rates.device_bytes,
            network,
        )

    def _link(self, weight_bytes: float) -> float:
        """The bytes a second to each device: those of its own link where host memory
        holds all weights, else a share of the drive's."""
        machine = self.whole.machine
        part = part_of(machine, self.group.num_local)
        links = rates_of(part, self.whole.policy, self._dtype).links
        fits = weight_bytes <= USABLE * machine.host_memory * self.group.num_nodes
        if Tier.HOST in links and (fits or Tier.DISK not in links):
            return links[Tier.HOST]
        return links[Tier.DISK]
