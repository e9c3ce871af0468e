"""Says in sentences what limits the speed of a plan, and what would change it."""

from ...io.tier import Tier
from ...scheduler.cost.load_cost import LoadCosts
from ...scheduler.cost.ranked_pass import RANKS
from ..monitoring.show import human_bytes
from ..policy import Policy
from .dtypes import DtypeChoice, dtype_advice, dtype_words
from .planned import Choice
from .planner import Planner
from .tensor_ranked import TensorPlanner


def explain(planner: Planner, choice: Choice) -> list[str]:
    """Sentences: what limits the speed of `choice`, how much more in flight would hide
    it, and what is kept beside the weights, and where."""
    found = [_binds(planner, choice)]
    found += _kv(planner, choice)
    found += _states(choice)
    found += _activations(choice)
    note = choice.forecast.shape.note
    return [*found, note] if planner.task.keeps_kv and note else found


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
    if prediction.binds == RANKS and isinstance(planner, TensorPlanner):
        return (
            f"ranks wait for each other's rows: {prediction.wait_seconds:.2f} s of a "
            f"pass of {prediction.pass_seconds:.2f} s; a faster network would hide it"
        )
    if prediction.binds == RANKS:
        return (
            f"ranks wait for each other: {prediction.wait_seconds:.2f} s of a pass of "
            f"{prediction.pass_seconds:.2f} s; more micro-batches in flight would hide "
            "it"
        )
    tier = prediction.binds
    loading = weight_seconds(choice).get(tier, 0.0)
    # Traffic other than weights grows with what is in flight, as computing does.
    grows = prediction.busy_seconds.get(tier, 0.0) - loading
    what = planner.task.unit_in_flight
    says = f"{tier} binds: {links[tier] / 1e9:.2f} GB/s; "
    if grows >= compute:
        beside = "keys and values" if planner.task.keeps_kv else "activations"
        return says + (
            f"{beside} take {grows:.2f} s of a pass on its link, and computing "
            f"{compute:.2f} s: more {what} in flight would not hide it"
        )
    wanted = planner.task.in_flight(choice.policy) * loading / (compute - grows)
    return says + (
        f"about {wanted:,.0f} {what} in flight would hide it{_room(planner, choice)}"
    )


def _kv(planner: Planner, choice: Choice) -> list[str]:
    """A sentence for keys and values that come back over a link."""
    tier, links = choice.policy.kv.tier, choice.forecast.model.rates.links
    if not choice.need.kv or tier not in links:
        return []
    num, size = choice.policy.sequences_in_flight, human_bytes(choice.need.kv)
    seconds = choice.prediction.busy_seconds.get(tier, 0.0)
    seconds -= weight_seconds(choice).get(tier, 0.0)
    where = "stay in host memory"
    if tier == "disk":
        where = f"go to disk{_drive(planner)}"
    return [
        f"keys and values of {num:,} sequences ({size}) {where}: {seconds:.2f} s of "
        f"each pass on the link of {tier}, beside the weights"
    ]


def _drive(planner: Planner) -> str:
    """How much the drive has free, as a part of a sentence."""
    disk = planner.machine.disk
    if disk is None or disk.free is None:
        return ", whose room is not known: penstock machine measures it"
    return f" ({human_bytes(disk.free)} are free)"


def _states(choice: Choice) -> list[str]:
    """A sentence for what layers keep beside keys and values."""
    if not choice.need.states:
        return []
    num = choice.policy.sequences_in_flight
    return [
        f"what layers keep of {num:,} sequences beside keys and values "
        f"({human_bytes(choice.need.states)}) stays on the device"
    ]


def _activations(choice: Choice) -> list[str]:
    """A sentence for activations that wait in host memory."""
    if not choice.need.waiting:
        return []
    return [
        f"activations of waiting micro-batches ({human_bytes(choice.need.waiting)}) "
        "move out to host memory and back (activations: host), which leaves the device "
        f"{human_bytes(choice.need.activations)} of them"
    ]


def _room(planner: Planner, choice: Choice) -> str:
    """Why no more is in flight, as the end of a sentence."""
    if planner.objective == "latency":
        return ", which would take longer for each"
    key = planner.task.in_flight_key
    asked = getattr(planner.policy, key)
    if key in planner.policy.model_fields_set and asked != "auto":
        return f"; you set {key} to {planner.task.in_flight(choice.policy):,}"
    return f"; you have memory for {planner.most_in_flight():,}"


def prediction_busy(choice: Choice) -> float:
    """The seconds of a pass that the busiest link needs for weights."""
    return max(weight_seconds(choice).values(), default=0.0)


def weight_seconds(choice: Choice) -> dict[str, float]:
    """The seconds of a pass that each link needs for weights, by tier."""
    model = choice.forecast.model
    busy: dict[str, float] = {}
    costs = LoadCosts(model.rates)
    for unit in model.shape.streamed:
        tier = model.settings.placement[unit]
        if tier != Tier.DEVICE and tier in model.rates.links:
            cost = model.shape.units[unit]
            seconds, _ = costs.of(cost, tier, model.settings.kept_of(unit))
            busy[tier] = busy.get(tier, 0.0) + seconds
            crossing = model.rates.crossing_seconds(tier, seconds)
            busy[Tier.HOST] = busy.get(Tier.HOST, 0.0) + crossing
    return busy


def dtype_sentences(found: DtypeChoice, *, is_open: bool) -> list[str]:
    """A sentence for the dtype, where it is not the checkpoint's own or another would
    be faster."""
    if not is_open:
        return dtype_advice(found, is_open=False)
    if not found.others:
        return []
    return [f"computing in {dtype_words(found, is_open=True)}"]


def kept_words(asked: Policy) -> list[str]:
    """A sentence that lists the keys that the user set."""
    kept = sorted(asked.model_fields_set)
    return [f"kept as you set them: {', '.join(kept)}"] if kept else []
