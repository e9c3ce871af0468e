"""A plan as a table for people."""

from rich.table import Table

from ..monitoring.show import human_bytes
from ..plans.devices import DeviceOption, Devices
from ..plans.plan import Plan

_SHOWN = (
    "device",
    "dtype",
    "device_memory",
    "host_memory",
    "micro_batch_tokens",
    "tokens_in_flight",
    "micro_batch_sequences",
    "sequences_in_flight",
    "activations",
)


def plan_table(plan: Plan) -> Table:
    """A table of what was chosen, the bytes per tier, and what is predicted."""
    choice, found = plan.choice, plan.choice.prediction
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    if plan.task.keeps_kv:
        table.add_row(plan.task.rate_unit, f"{found.output_tokens_per_second:,.1f}")
    table.add_row("tokens/s", f"{found.tokens_per_second:,.1f}")
    table.add_row("a pass", f"{found.pass_seconds:.3f} s")
    table.add_row("  computing", f"{found.compute_seconds:.3f} s")
    table.add_row("  waiting", f"{found.wait_seconds:.3f} s")
    table.add_row("binds", found.binds)
    table.add_row("MFU", f"{plan.utilisation:.1%}")
    if plan.cost_per_million is not None:
        table.add_row("price of a million tokens", _price(plan.cost_per_million))
    for tier, nbytes in choice.forecast.bytes_by_tier.items():
        if nbytes:
            table.add_row(f"weights in {tier}", human_bytes(nbytes))
    table.add_row("activations", human_bytes(choice.need.activations))
    if choice.need.waiting:
        table.add_row("  waiting in host memory", human_bytes(choice.need.waiting))
    if choice.need.kv:
        table.add_row("keys and values", human_bytes(choice.need.kv))
    if choice.need.states:
        table.add_row("states", human_bytes(choice.need.states))
    chosen = plan.policy.model_fields_set
    for key in _SHOWN:
        if key in chosen:
            value = getattr(plan.policy, key)
            table.add_row(key, _shown(key, value))
    if plan.task.keeps_kv:
        table.add_row("kv.tier", plan.policy.kv.tier)
    table.add_row("io.reader", plan.policy.io.reader)
    return table


def devices_table(devices: Devices) -> Table:
    """A table of the ways to use several devices: those that Penstock runs, then
    formulas."""
    crossover = devices.crossover_tokens
    caption = devices.note
    if crossover is not None:
        caption = (
            f"from {crossover:,.0f} tokens a pass on, moving weights between devices "
            f"moves less than moving tokens; {devices.note}"
        )
    table = Table(
        title=f"{devices.num} {devices.unit}",
        caption=caption,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("way")
    table.add_column("run by")
    for title in ("tokens a pass", "a pass", "tokens/s", "MFU"):
        table.add_column(title, justify="right")
    if devices.price_per_hour is not None:
        table.add_column("a million tokens", justify="right")
    table.add_column("note")
    is_run = True
    for way in devices.ways:
        if is_run and not way.is_run:
            table.add_section()
        is_run = way.is_run
        rate, seconds = way.tokens_per_second, way.pass_seconds
        prices = []
        if devices.price_per_hour is not None:
            prices = [_price(devices.cost_per_million(way))]
        table.add_row(
            way.name,
            _run_by(way, devices),
            f"{way.num_tokens:,}",
            "-" if seconds is None else f"{seconds:.3f} s",
            "-" if rate is None else f"{rate:,.0f}",
            _share(devices.utilisation(way)),
            *prices,
            f"{way.how}: {way.note}" if way.how and way.is_run else way.note,
        )
    return table


def _run_by(way: DeviceOption, devices: Devices) -> str:
    if way is devices.best:
        return "Penstock, fastest"
    return {"penstock": "Penstock", "nothing": "-"}.get(way.run_by, way.run_by)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _price(value: float | None) -> str:
    return "-" if value is None else f"{value:,.3g}"


def _shown(key: str, value: object) -> str:
    if not isinstance(value, int):
        return str(value)
    return human_bytes(value) if key.endswith("_memory") else f"{value:,}"
