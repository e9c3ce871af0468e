"""Ways to use several devices, or several ranks, each with its speed and its price.
Pure."""

from dataclasses import dataclass
from typing import Any

from ...scheduler.cost.worth import cost_per_million, utilisation
from .rank_plans import PassSwitch

_AS_GOOD = 0.98


@dataclass(frozen=True, slots=True)
class DeviceOption:
    """One way to use the devices."""

    name: str
    is_run: bool
    """Whether Penstock runs it on such a machine."""
    note: str
    num_tokens: int
    """The tokens (or sequences) that share a pass, over all devices."""
    pass_seconds: float | None
    """The seconds of a pass; None where it does not fit."""
    how: str = ""
    """The option or the key of the policy that runs it; "" for this plan."""
    is_formula: bool = False
    """Whether the seconds are those of a formula, which leaves things out."""

    @property
    def run_by(self) -> str:
        """Who runs it: `penstock`, or `nothing`; `formula`, if it is one."""
        if self.is_run:
            return "penstock"
        return "formula" if self.is_formula else "nothing"

    @property
    def tokens_per_second(self) -> float | None:
        """The tokens (or sequences) of a pass by its seconds."""
        return self.num_tokens / self.pass_seconds if self.pass_seconds else None


@dataclass(frozen=True, slots=True)
class Devices:
    """All ways to use the devices; those that Penstock runs come first."""

    num: int
    unit: str
    """What there are `num` of: devices or ranks."""
    ways: tuple[DeviceOption, ...]
    crossover_tokens: float | None
    """The number of tokens in a pass from which on moving weights between devices moves
    fewer bytes than moving tokens; None without a formula."""
    note: str
    """Why there is no formula, or what it leaves out."""
    flops_per_token: float
    peak_flops: float
    """FLOP/s of all devices together."""
    price_per_hour: float | None
    """The price of all machines together."""
    switches: tuple[PassSwitch, ...] = ()
    """For which passes ranks that divide products are faster than ones that gather
    weights."""

    @property
    def best(self) -> DeviceOption | None:
        """The fastest of those that Penstock runs: the first one where several are
        about as fast. None where none fits."""
        run = [way for way in self.ways if way.is_run and way.tokens_per_second]
        most = max((way.tokens_per_second or 0.0 for way in run), default=0.0)
        good = (w for w in run if (w.tokens_per_second or 0.0) >= _AS_GOOD * most)
        return next(good, None)

    def utilisation(self, way: DeviceOption) -> float | None:
        """Model FLOPs utilisation of all devices, 0 to 1; None where it does not
        fit."""
        rate = way.tokens_per_second
        if rate is None:
            return None
        return utilisation(rate, self.flops_per_token, self.peak_flops)

    def cost_per_million(self, way: DeviceOption) -> float | None:
        """The price of a million tokens; None without a price."""
        return cost_per_million(self.price_per_hour, way.tokens_per_second or 0.0)

    def to_json(self) -> dict[str, Any]:
        """The values for `--json`. Times are in seconds."""
        return {
            "num_devices": self.num,
            "fastest": self.best.name if self.best else None,
            "crossover_tokens": self.crossover_tokens,
            "note": self.note,
            "switches": [one.to_json() for one in self.switches],
            "ways": [
                {
                    "name": way.name,
                    "run_by": way.run_by,
                    "how": way.how,
                    "note": way.note,
                    "tokens_in_pass": way.num_tokens,
                    "pass_seconds": way.pass_seconds,
                    "tokens_per_second": way.tokens_per_second,
                    "mfu": self.utilisation(way),
                    "cost_per_million_tokens": self.cost_per_million(way),
                }
                for way in self.ways
            ],
        }
