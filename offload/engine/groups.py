"""The two groups of parts that an engine is made of: the weights of a model, and how
forwards run on them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ...io.timeline import Timeline
from ...scheduler.order import Order
from ...scheduler.ranks.rank_statistics import RankStatistics
from ...scheduler.slots.working_set import WorkingSet
from ...scheduler.sweep.coalescing import RowWise
from ...scheduler.sweep.entry import ForwardEntry
from ..kv.tiers import KvTiers
from ..ranks.exchange import Exchange
from ..ranks.gathered_loads import GatheredLoads
from ..ranks.stage_modules import StageModules
from ..units.arrangement import Arrangement
from ..weights.binding import Binding
from ..weights.row_gatherer import RowGatherer
from .host_cache import HostCache
from .moved_tensors import MovedTensors
from .tiers import Tiers

if TYPE_CHECKING:
    from .compilation import Compilation


@dataclass(frozen=True)
class Weights:
    """The weights of one model: where they are, and how they come into its modules."""

    arrangement: Arrangement
    """Which units there are, and the tier of each."""
    tiers: Tiers
    """Keeps units, and loads them into slots."""
    working_set: WorkingSet
    """The slots."""
    binding: Binding
    """Puts what slots hold into the model's modules."""
    gatherers: Mapping[str, RowGatherer]
    """Read single rows of tables that are in no unit, by the table's name."""
    moved: MovedTensors
    """The tensors that are not streamed; they are on the device."""
    host_cache: HostCache
    """Keeps experts in host memory that are used most, and computes some there."""

    @property
    def bytes_gathered(self) -> int:
        """Bytes of single rows that were read."""
        return sum(gatherer.bytes_gathered for gatherer in self.gatherers.values())

    @cached_property
    def units_of(self) -> Mapping[str, tuple[int, ...]]:
        """The units of each streamed tensor, by its name: one, or its pieces."""
        units: dict[str, list[int]] = {}
        for index, unit in enumerate(self.arrangement.division.found.units):
            for name in unit.tensors:
                units.setdefault(name, []).append(index)
        return {name: tuple(found) for name, found in units.items()}


@dataclass(frozen=True, slots=True)
class Ranked:
    """What a model that several ranks share has on this one."""

    modules: StageModules
    exchange: Exchange
    num_on_device: int = 1
    """The ranks of this machine that compute on the same device."""


@dataclass(frozen=True, slots=True)
class Forwards:
    """How forwards of one model run."""

    entry: ForwardEntry
    """Every forward passes it; it asks for the weights of the sites to come."""
    compilation: "Compilation | None"
    row_wise: Sequence[RowWise]
    """The modules that micro-batches of a sweep may call jointly."""
    row_order: Order
    """The order in which these are called."""
    kv: KvTiers | None
    """None if keys and values stay where transformers keeps them."""
    timeline: Timeline
    ranked: Ranked | None = None
    """None if this process computes the whole model."""
    gathered: GatheredLoads | None = None
    """Loads units together with other ranks; None if this rank reads them alone."""

    @property
    def exchange(self) -> Exchange | None:
        """Speaks to the ranks that share the model; None if there are none."""
        return None if self.ranked is None else self.ranked.exchange

    def rank_statistics(self) -> RankStatistics:
        part = self.exchange or self.gathered
        return RankStatistics() if part is None else part.statistics()

    @property
    def closers(self) -> Sequence[Callable[[], None]]:
        """Functions that close what no forward needs any more."""
        parts = (self.exchange, self.kv)
        first = () if self.gathered is None else (self.gathered.withdraw,)
        return (*first, *(part.close for part in parts if part is not None))
