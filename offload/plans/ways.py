"""Finds the ways to use several devices, or several ranks: those that Penstock runs,
and what formulas say of one model split over all of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ...io.errors import DoesNotFitError, PolicyError, UsageError
from ...io.tier import Tier
from ...scheduler.cost.partitioning import (
    Chips,
    LayoutCost,
    gather_crossover_tokens,
    layout_costs,
)
from ..policy import Policy
from .devices import DeviceOption, Devices
from .forecast import dtype_of
from .formulas import blocks_of, config_of, network_of, why_no_formula
from .part_machine import part_of
from .planned import USABLE, Choice
from .planner import Planner
from .ranked import (
    GatheringPlanner,
    RankedPlanner,
    RankGroup,
    SharedPlanner,
    gathering_planner,
    messages_of,
)
from .rates import peak_flops, rates_of

Deal = Callable[[Planner, RankGroup], RankedPlanner]
"""Makes the planner for ranks from the one for a process that has the whole model."""
_MODES = {"gather-stream": "gather", "TP-stream": "tensor"}
"""The layouts that a value of `ranks` in the policy runs, where it knows that value."""
_FORMULA_OF = {"gather": "gather-stream"}
"""The formula of a layout that is planned for."""
_TWO_DIMENSIONAL = "weight-stationary 2D"


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
        ways = [*self._alone(), *self._peers(), self._workers(), self._pipeline()]
        ways += self._gather()
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
            made = {_FORMULA_OF.get(way.name) for way in ways}
            ways += [
                self._layout(cost, tokens, chips)
                for cost in costs
                if cost.name not in made
            ]
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
        the weights in it; each has a link of its own."""
        num, local = self.group.num, self.group.num_local
        name, how = f"a job each (--workers {local})", f"--workers {local}"
        if self.group.num_nodes > 1:
            name, how = "a job each", f"{how}, and a part of the rows on each machine"
        part = part_of(self.whole.machine, local)
        each = self.whole.under(part, {})
        try:
            found = each.choose()
        except DoesNotFitError:
            return DeviceOption(name, True, "does not fit", 0, None, how)
        note = f"{found.prediction.binds} binds"
        if local > 1:
            note += "; the drive is shared"
        if self.whole.machine.is_accelerated:
            found = each.with_shared_host(found, num) or found
            note = f"{note}, host_shared: true"
        return self._option(name, note, found, num, how)

    def _pipeline(self) -> DeviceOption:
        """Each rank has its own blocks."""
        how = self._how("pipeline")
        refusal, note = self._refusal("pipeline"), "this plan"
        try:
            found = self.choice
            if not isinstance(self.planner, RankedPlanner):
                found = self.deal(self.whole, self.group).choose()
                note = f"{found.prediction.binds} binds; each has 1/{self.group.num}"
        except (DoesNotFitError, UsageError) as error:
            why = "does not fit" if isinstance(error, DoesNotFitError) else f"{error}"
            return DeviceOption("pipeline", not refusal, why, 0, None, how)
        note = f"{note}; {refusal}" if refusal else note
        tokens = self.whole.task.in_flight(found.policy)
        seconds = found.prediction.pass_seconds
        return DeviceOption("pipeline", not refusal, note, tokens, seconds, how)

    def _gather(self) -> Iterator[DeviceOption]:
        """Each rank reads a part, and has rows of its own. Nothing where that is not
        run: then there is a formula."""
        if self.group.num < 2 or self._refusal("gather"):
            return
        how, note = self._how("gather"), "this plan"
        found = self.choice
        if not isinstance(self.planner, GatheringPlanner):
            try:
                found = gathering_planner(self.whole, self.group).choose()
            except DoesNotFitError:
                yield DeviceOption("gather", True, "does not fit", 0, None, how)
                return
            note = f"{found.prediction.binds} binds; each reads 1/{self.group.num}"
        yield self._option("gather", note, found, self.group.num, how)

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

    def _layout(self, cost: LayoutCost, tokens: int, chips: Chips) -> DeviceOption:
        mode = _MODES.get(cost.name)
        is_run = mode is not None and not self._refusal(mode)
        how = self._how(mode) if mode is not None and is_run else ""
        if cost.chip_bytes > USABLE * chips.memory_bytes:
            note = f"does not fit: {cost.chip_bytes / 1e9:,.0f} GB of weights on each"
            return DeviceOption(cost.name, is_run, note, tokens, None, how, True)
        parts = {
            "compute": cost.compute_seconds,
            "links": cost.link_seconds,
            "network": cost.network_seconds,
        }
        note = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in parts.items())
        if cost.name == _TWO_DIMENSIONAL:
            note += "; not run"
        seconds = cost.pass_seconds
        return DeviceOption(cost.name, is_run, note, tokens, seconds, how, True)
