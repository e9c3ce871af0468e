"""Ways to use a machine with several devices: those that Penstock runs, and what
formulas say of one model split over all of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...io.errors import DoesNotFitError
from ...io.tier import Tier
from ...scheduler.cost.partitioning import (
    Blocks,
    Chips,
    LayoutCost,
    gather_crossover_tokens,
    layout_costs,
)
from ..machines.machine import Disk, Machine
from .planned import Choice
from .planner import USABLE, Planner


@dataclass(frozen=True, slots=True)
class DeviceOption:
    """One way to use the devices."""

    name: str
    is_run: bool
    """Whether Penstock runs it; else it is only a formula."""
    note: str
    num_tokens: int
    """The tokens (or sequences) that share a pass, over all devices."""
    pass_seconds: float | None
    """The seconds of a pass; None where it does not fit."""

    @property
    def tokens_per_second(self) -> float | None:
        """The tokens (or sequences) of a pass by its seconds."""
        return self.num_tokens / self.pass_seconds if self.pass_seconds else None


@dataclass(frozen=True, slots=True)
class Devices:
    """All ways to use the devices; those that Penstock runs come first."""

    num: int
    ways: tuple[DeviceOption, ...]
    crossover_tokens: float | None
    """The number of tokens in a pass from which on moving weights between devices moves
    fewer bytes than moving tokens; None without a formula."""
    note: str
    """Why there is no formula, or what it leaves out."""

    def to_json(self) -> dict[str, Any]:
        """The values for `--json`. Times are in seconds."""
        return {
            "num_devices": self.num,
            "crossover_tokens": self.crossover_tokens,
            "note": self.note,
            "ways": [
                {
                    "name": way.name,
                    "run_by": "penstock" if way.is_run else "formula",
                    "note": way.note,
                    "tokens_in_pass": way.num_tokens,
                    "pass_seconds": way.pass_seconds,
                    "tokens_per_second": way.tokens_per_second,
                }
                for way in self.ways
            ],
        }


def devices_of(planner: Planner, choice: Choice) -> Devices | None:
    """The ways to use the devices of the planner's machine; None where it has one
    device."""
    machine = planner.machine
    num = machine.num_devices
    if num < 2 or not machine.is_accelerated:
        return None
    run = [_alone(planner, choice, num), *_peers(planner), _workers(planner)]
    tokens = max(way.num_tokens for way in run)
    why_not = _no_formula(planner)
    if why_not:
        return Devices(num, tuple(run), None, why_not)
    blocks, chips = _blocks(planner, choice), _chips(planner, choice, tokens)
    itemsize = choice.forecast.shape.itemsize
    costs = layout_costs(
        tokens,
        blocks,
        chips,
        link_bandwidth=_link(planner, choice, blocks.parameters * itemsize),
        itemsize=itemsize,
    )
    crossover = gather_crossover_tokens(
        blocks.parameters * itemsize / blocks.layers, blocks.hidden, itemsize
    )
    ways = [*run, *(_formula(cost, tokens, chips) for cost in costs)]
    note = (
        "formulas (arXiv 2211.05102) leave out attention, keys and values and take "
        "peak rates: Penstock runs none of these layouts; what it runs is predicted, "
        "and not measured on several GPUs yet"
    )
    return Devices(num, tuple(ways), crossover, note)


def _alone(planner: Planner, choice: Choice, num: int) -> DeviceOption:
    idle = f"this plan; {num - 1} idle"
    note = "this plan" if planner.policy.peer else idle
    tokens = planner.task.in_flight(choice.policy)
    return DeviceOption(
        "one device", True, note, tokens, choice.prediction.pass_seconds
    )


def _peers(planner: Planner) -> Iterator[DeviceOption]:
    """One device computes, the others keep weights for it. Nothing where the user has
    set peers or the machine is no GPU."""
    machine = planner.machine
    if planner.policy.peer or machine.device_memory is None:
        return
    nbytes = int(machine.device_memory * USABLE)
    kind = machine.device
    peer = {f"{kind}:{index}": nbytes for index in range(1, machine.num_devices)}
    name = "others keep weights (peer)"
    try:
        found = planner.under(machine, {"device": f"{kind}:0", "peer": peer}).choose()
    except DoesNotFitError:
        yield DeviceOption(name, True, "does not fit", 0, None)
        return
    kept = found.forecast.bytes_by_tier[Tier.PEER]
    note = f"one computes; {kept / 1e9:,.0f} GB of weights on the others"
    tokens = planner.task.in_flight(found.policy)
    yield DeviceOption(name, True, note, tokens, found.prediction.pass_seconds)


def _workers(planner: Planner) -> DeviceOption:
    """A job on each device. They share the drive, the host's memory and one copy of the
    weights in it; each has a link of its own."""
    machine = planner.machine
    num = machine.num_devices
    name = f"a job each (--workers {num})"
    each = planner.under(_shared_out(machine), {})
    try:
        found = each.choose()
    except DoesNotFitError:
        return DeviceOption(name, True, "does not fit", 0, None)
    found = each.with_shared_host(found, num) or found
    tokens = num * planner.task.in_flight(found.policy)
    note = f"{found.prediction.binds} binds; the drive is shared, host_shared: true"
    return DeviceOption(name, True, note, tokens, found.prediction.pass_seconds)


def _shared_out(machine: Machine) -> Machine:
    """The machine as each of its devices has it when all are used."""
    num, disk = machine.num_devices, machine.disk
    if disk is not None:
        rates = {reader: int(rate / num) for reader, rate in disk.bandwidth.items()}
        disk = Disk(**{**disk.model_dump(), "bandwidth": rates})
    memory = machine.host_memory // num
    values = {"host_memory": memory, "disk": disk, "num_devices": 1}
    return machine.model_copy(update=values)


def _no_formula(planner: Planner) -> str:
    """Why there is no formula for this model and machine; "" where there is one."""
    machine, config = planner.machine, _config(planner)
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers")
    missing = [s for s in sizes if not isinstance(getattr(config, s, None), int)]
    if missing:
        return f"no formulas: the model's config has no {', '.join(missing)}"
    experts = ("num_local_experts", "num_experts", "n_routed_experts")
    if any(getattr(config, name, None) for name in experts):
        return "no formulas: those of the paper are for models without experts"
    if machine.copies is None and machine.network_bandwidth is not None:
        return f"no formulas: machine {machine.name!r} has no copies"
    if _network(machine) is None:
        return f"no formulas: machine {machine.name!r} has no network_bandwidth"
    return ""


def _config(planner: Planner) -> Any:
    config = getattr(planner.module, "config", None)
    return config.get_text_config() if config is not None else None


def _network(machine: Machine) -> float | None:
    if machine.network_bandwidth is not None:
        return float(machine.network_bandwidth)
    peer = machine.copies.peer if machine.copies is not None else None
    return None if peer is None else float(peer)


def _blocks(planner: Planner, choice: Choice) -> Blocks:
    config = _config(planner)
    parameters = choice.forecast.shape.flops_per_token / 2
    heads = getattr(config, "num_attention_heads", None) or 1
    return Blocks(
        parameters,
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def _chips(planner: Planner, choice: Choice, tokens: int) -> Chips:
    machine, rates = planner.machine, choice.forecast.model.rates
    memory, network = machine.device_memory, _network(machine)
    assert memory is not None, "it is a GPU"
    assert network is not None, "there is a formula"
    return Chips(
        machine.num_devices,
        rates.matmul_flops.at(tokens / machine.num_devices),
        float(memory),
        rates.device_bytes,
        network,
    )


def _link(planner: Planner, choice: Choice, weight_bytes: float) -> float:
    """The bytes a second to each device: those of its own link where host memory holds
    all weights, else a share of the drive's."""
    machine, links = planner.machine, choice.forecast.model.rates.links
    if weight_bytes <= USABLE * machine.host_memory or Tier.DISK not in links:
        return links[Tier.HOST]
    return links[Tier.DISK] / machine.num_devices


def _formula(cost: LayoutCost, tokens: int, chips: Chips) -> DeviceOption:
    if cost.chip_bytes > USABLE * chips.memory_bytes:
        note = f"does not fit: {cost.chip_bytes / 1e9:,.0f} GB of weights on each"
        return DeviceOption(cost.name, False, note, tokens, None)
    parts = {
        "compute": cost.compute_seconds,
        "links": cost.link_seconds,
        "network": cost.network_seconds,
    }
    note = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in parts.items())
    return DeviceOption(cost.name, False, note, tokens, cost.pass_seconds)
