"""Chooses the dtype that a plan computes in where the policy leaves it open."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...io.errors import DoesNotFitError
from ...scheduler.cost.rates import Curve
from ..machines.machine import Machine
from .planned import Choice
from .planner import Planner

HALF = ("bfloat16", "float16")
WIDE = "float32"
_FASTER = 1.1
"""Another dtype must have at least this many times the rate of the checkpoint's own."""


@dataclass(frozen=True)
class Tried:
    """What the planner chose for one dtype."""

    dtype: str
    planner: Planner
    choice: Choice | None
    """None where it does not fit; `refusal` says why."""
    refusal: DoesNotFitError | None = None


@dataclass(frozen=True)
class DtypeChoice:
    """The dtype that a plan computes in, and the others that were tried."""

    taken: Tried
    own: Tried
    """The checkpoint's dtype, or the one that the policy sets."""
    others: Sequence[Tried]
    products: Mapping[str, float]
    """The FLOP/s of matrix products by dtype, with as many rows as the plan's have."""

    @property
    def speed_up(self) -> float:
        """The rate of float32 products over that of products in the checkpoint's dtype;
        1 where one of them is unknown."""
        own, wide = self.products.get(self.own.dtype), self.products.get(WIDE)
        return wide / own if own and wide else 1.0


def dtypes_beside(own: str, device: str) -> tuple[str, ...]:
    """The dtypes to try beside `own`, the checkpoint's. A CPU that emulates 16-bit
    products is several times as fast in float32. A dtype with fewer bits than `own` is
    never tried. Pure."""
    return (WIDE,) if own in HALF and device == "cpu" else ()


def try_dtype(dtype: str, planner: Planner) -> Tried:
    """What `planner` chooses for a model in `dtype`."""
    try:
        return Tried(dtype, planner, planner.choose())
    except DoesNotFitError as error:
        return Tried(dtype, planner, None, error)


def choose_dtype(
    own: Tried, others: Sequence[Tried], machine: Machine, *, is_open: bool
) -> DtypeChoice:
    """The fastest dtype that fits, by its plan; `own` where no other is clearly faster,
    or where `is_open` is false. Raises the refusal of `own` where none fits. Pure."""
    fitting = [each for each in others if is_open and each.choice is not None]
    best = max(fitting, key=_speed, default=own)
    taken = best if _speed(best) > _FASTER * _speed(own) else own
    if taken.choice is None:
        assert own.refusal is not None, "what has no choice was refused"
        raise own.refusal
    width = _width(taken.choice, taken.planner)
    names = [each.dtype for each in (own, *others)]
    return DtypeChoice(taken, own, others, _products(names, machine, width))


def _speed(tried: Tried) -> float:
    """The speed of a plan, by its objective; 0 where it does not fit."""
    if tried.choice is None:
        return 0.0
    if tried.planner.objective == "latency":
        return 1.0 / max(tried.choice.prediction.seconds, 1e-9)
    return tried.choice.rate


def _width(choice: Choice, planner: Planner) -> int:
    """The rows of a matrix product under `choice`."""
    policy = choice.policy
    is_joint = choice.forecast.model.settings.is_coalesced
    key = planner.task.in_flight_key if is_joint else planner.task.micro_batch_key
    return int(getattr(policy, key))


def _products(dtypes: Sequence[str], machine: Machine, rows: int) -> dict[str, float]:
    known = {str(name): by_rows for name, by_rows in machine.matmul.items()}
    return {name: Curve.of(known[name]).at(rows) for name in dtypes if name in known}


def dtype_words(found: DtypeChoice, *, is_open: bool, lacks: bool = False) -> str:
    """The dtype and the reason for it, as a part of a sentence. `lacks`: this CPU is
    known to have no instructions for the checkpoint's own dtype. Pure."""
    own, taken, times = found.own.dtype, found.taken.dtype, found.speed_up
    if not is_open:
        return f"{taken} (as you set it)"
    if taken != own:
        why = f"{times:.1f}x faster here than {own}"
        if lacks:
            why = f"this CPU has no {own} instructions: {times:.1f}x slower there"
        return f"{taken} ({why})"
    if times > _FASTER and any(each.refusal for each in found.others):
        return (
            f"{own} (the checkpoint's: {WIDE} is {times:.1f}x faster, but does not fit)"
        )
    return f"{own} (the checkpoint's)"


def dtype_advice(found: DtypeChoice, *, is_open: bool) -> list[str]:
    """Advice of a dtype that would be faster by its plan, where the user has set
    another."""
    best = max(found.others, key=_speed, default=found.own)
    if is_open or _speed(best) <= _FASTER * _speed(found.own):
        return []
    assert found.own.choice is not None, "it was taken"
    assert best.choice is not None, "it has a speed"
    now, then = found.own.choice.rate, best.choice.rate
    return [
        f"dtype={best.dtype} would be {then / now:.1f} times as fast by its plan "
        f"({then:,.1f} tokens/s, not {now:,.1f}), and fits: take dtype out, or set it"
    ]
