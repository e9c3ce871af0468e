"""What comes to sites and leaves them beside weights: hidden states, keys and values.
Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from .pipeline import WeightLoad
from .rates import Rates
from .shape import MicroBatchShape, ModelShape, Settings, total_tokens


@dataclass(frozen=True, slots=True)
class Moved:
    """Of all micro-batches at one site, in a pass."""

    site: int
    load: WeightLoad
    """Over the link that weights from the same tier come over, too."""
    out_seconds: float
    """Beside computing, and beside what comes in."""


def activations_moved(
    shape: ModelShape,
    rates: Rates,
    settings: Settings,
    batches: Sequence[MicroBatchShape],
) -> list[Moved]:
    """Hidden states that wait in host memory come to each site and leave it again."""
    if not settings.activations_move:
        return []
    nbytes = total_tokens(batches) * shape.hidden * shape.itemsize
    load = WeightLoad("host", 0, nbytes / rates.links.get("host", rates.device_bytes))
    out = nbytes / rates.out_bytes
    return [Moved(site, load, out) for site in range(len(shape.sites))]


def kv_moved(
    shape: ModelShape,
    rates: Rates,
    settings: Settings,
    *,
    num_new: int,
    num_rows: int = 0,
    context: float = 0.0,
) -> list[Moved]:
    """Keys and values of `num_new` tokens go to their tier, and those of `num_rows`
    sequences of `context` tokens come from there. A drive does one or the other, as
    fast as it reads: a machine's file knows no other rate."""
    tier = settings.kv_tier
    found: list[Moved] = []
    for number, site in enumerate(shape.sites):
        each = site.kv_per_token * (settings.kv_itemsize or shape.itemsize)
        if tier not in rates.links or not each:
            continue
        moved, out = num_rows * each * max(1.0, site.context(context)), 0.0
        if tier == "disk":
            moved += num_new * each
        else:
            out = num_new * each / rates.out_bytes
        found.append(Moved(number, WeightLoad(tier, 0, moved / rates.links[tier]), out))
    return found
