"""Says in sentences what binds a plan, and what would change it."""

from ..scheduler.workload import Generating
from .forecast import dtype_of
from .planner import Choice, Planner
from .show import human_bytes

_MUCH_FASTER = 1.5


def explain(planner: Planner, choice: Choice) -> list[str]:
    """What binds `choice`, how much more in flight would hide it, what a dtype or more
    memory would do, and what was kept as the user set it."""
    found = [_binds(planner, choice)]
    found += _dtype(planner, choice)
    kept = sorted(planner.policy.model_fields_set)
    if kept:
        found.append(f"kept as you set them: {', '.join(kept)}")
    return found


def _binds(planner: Planner, choice: Choice) -> str:
    prediction = choice.prediction
    compute = prediction.compute_seconds
    costs = choice.forecast.model
    links = costs.rates.links
    loading = prediction_busy(choice)
    if prediction.binds == "compute":
        if not loading:
            return "computing binds: all weights stay in memory"
        share = loading / prediction.pass_seconds if prediction.pass_seconds else 0.0
        return (
            f"computing binds: weights come in {loading:.2f} s of a pass of "
            f"{prediction.pass_seconds:.2f} s ({share:.0%})"
        )
    tier = prediction.binds
    wanted = in_flight(planner, choice) * loading / compute if compute else 0.0
    what = "sequences" if planner.task.generates else "tokens"
    return (
        f"{tier} binds: {links[tier] / 1e9:.2f} GB/s; about {wanted:,.0f} {what} in "
        f"flight would hide it{_room(planner, choice)}"
    )


def _room(planner: Planner, choice: Choice) -> str:
    """Why no more are in flight."""
    if planner.objective == "latency":
        return ", which would take longer for each"
    key = "sequences_in_flight" if planner.task.generates else "tokens_in_flight"
    asked = getattr(planner.policy, key)
    if key in planner.policy.model_fields_set and asked != "auto":
        return f"; you set {key} to {in_flight(planner, choice):,}"
    return f"; you have memory for {planner.most_in_flight():,}"


def in_flight(planner: Planner, choice: Choice) -> int:
    """Tokens or sequences that share a pass."""
    policy = choice.policy
    if planner.task.generates:
        return policy.sequences_in_flight
    return policy.tokens_in_flight


def prediction_busy(choice: Choice) -> float:
    """Seconds of a pass that its busiest link needs."""
    model = choice.forecast.model
    busy: dict[str, float] = {}
    for unit in model.shape.streamed:
        tier = model.settings.placement[unit]
        if tier != "device" and tier in model.rates.links:
            busy[tier] = busy.get(tier, 0.0) + model.load_seconds(unit, tier)
    return max(busy.values(), default=0.0)


def _dtype(planner: Planner, choice: Choice) -> list[str]:
    """Another dtype in which this machine computes much faster."""
    now = dtype_of(planner.recipes)
    rates = planner.machine.matmul
    if now not in rates:
        return []
    rows = 512 if not isinstance(planner.work(choice.policy), Generating) else 64
    at = choice.forecast.model.rates.matmul_flops.at(rows)
    for name, by_rows in rates.items():
        nearest = by_rows[min(by_rows, key=lambda r: abs(r - rows))]
        if nearest > _MUCH_FASTER * at:
            more = human_bytes(sum(r.nbytes for r in planner.recipes.values()))
            return [
                f"products in {name} are {nearest / at:.1f} times as fast here as in "
                f"{now}: try dtype={name} (weights are cast on the way in; in {now} "
                f"they have {more})"
            ]
    return []
