"""What formulas of one model over many chips need to know of a model and a machine, and
what they say. Pure."""

from typing import Any

from ...scheduler.cost.partitioning import Blocks, Chips, LayoutCost
from ..machines.machine import Machine
from .devices import DeviceOption
from .planned import USABLE

_TWO_DIMENSIONAL = "weight-stationary 2D"


def blocks_of(config: Any, flops_per_token: float) -> Blocks:
    """The blocks of a model with this config, for which there is a formula."""
    heads = getattr(config, "num_attention_heads", None) or 1
    return Blocks(
        flops_per_token / 2,
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def why_no_formula(module: Any, machine: Machine) -> str:
    """Why there is no formula for this model and machine; "" where there is one."""
    config = config_of(module)
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers")
    missing = [s for s in sizes if not isinstance(getattr(config, s, None), int)]
    if missing:
        return f"no formulas: the model's config has no {', '.join(missing)}"
    experts = ("num_local_experts", "num_experts", "n_routed_experts")
    if any(getattr(config, name, None) for name in experts):
        return "no formulas: those of the paper are for models without experts"
    if not machine.is_accelerated:
        return ""
    if machine.copies is None and machine.network_bandwidth is not None:
        return f"no formulas: machine {machine.name!r} has no copies"
    if network_of(machine) is None:
        return f"no formulas: machine {machine.name!r} has no network_bandwidth"
    return ""


def config_of(module: Any) -> Any:
    """The config of the text model in `module`; None if it has none."""
    config = getattr(module, "config", None)
    return config.get_text_config() if config is not None else None


def network_of(machine: Machine) -> float | None:
    """Bytes per second of a device to its peers; None if that is not known."""
    if machine.network_bandwidth is not None:
        return float(machine.network_bandwidth)
    peer = machine.copies.peer if machine.copies is not None else None
    return None if peer is None else float(peer)


def layout_option(cost: LayoutCost, tokens: int, chips: Chips) -> DeviceOption:
    """What the formula of a layout says of passes of `tokens`."""
    if cost.chip_bytes > USABLE * chips.memory_bytes:
        note = f"does not fit: {cost.chip_bytes / 1e9:,.0f} GB of weights on each"
        return DeviceOption(cost.name, False, note, tokens, None, is_formula=True)
    parts = {
        "compute": cost.compute_seconds,
        "links": cost.link_seconds,
        "network": cost.network_seconds,
    }
    note = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in parts.items())
    if cost.name == _TWO_DIMENSIONAL:
        note += "; not run"
    return DeviceOption(
        cost.name, False, note, tokens, cost.pass_seconds, is_formula=True
    )
