"""Transfers other than weights: hidden states, keys and values. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...io.tier import Tier
from .pipeline import WeightLoad
from .rates import Rates
from .shape import MicroBatchShape, ModelShape, Settings, total_tokens


@dataclass(frozen=True, slots=True)
class Moved:
    """The transfers of all micro-batches at one site in one pass."""

    site: int
    load: WeightLoad
    """The transfer to the device, over the link that also brings weights from that
    tier."""
    out_seconds: float
    """The transfer from the device, which overlaps with computing and with `load`."""


def activations_moved(
    shape: ModelShape,
    rates: Rates,
    settings: Settings,
    batches: Sequence[MicroBatchShape],
) -> list[Moved]:
    """The transfers of hidden states that wait in host memory between sites."""
    if not settings.activations_move:
        return []
    nbytes = total_tokens(batches) * shape.hidden * shape.itemsize
    load = WeightLoad(
        Tier.HOST, 0, nbytes / rates.links.get(Tier.HOST, rates.device_bytes)
    )
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
    """The transfers of keys and values: those of `num_new` tokens go to their tier, and
    those of `num_rows` sequences of `context` tokens come from it. A drive is assumed
    to do one at a time and to write as fast as it reads."""
    tier = settings.kv_tier
    transfers: list[Moved] = []
    for number, site in enumerate(shape.sites):
        each = site.kv_per_token * (settings.kv_itemsize or shape.itemsize)
        if tier not in rates.links or not each:
            continue
        moved, out = num_rows * each * max(1.0, site.context(context)), 0.0
        if tier == Tier.DISK:
            moved += num_new * each
        else:
            out = num_new * each / rates.out_bytes
        transfers.append(
            Moved(number, WeightLoad(tier, 0, moved / rates.links[tier]), out)
        )
    return transfers
