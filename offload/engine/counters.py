"""The counters of a streamed model."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ...io.codecs.cast import CAST
from ...io.kv.count import KvStatistics
from ...io.merging import Rule, counter
from ...io.tier import Tier, tier_of
from ...io.weights.recipe import Recipe
from ...scheduler.ranks.rank_statistics import RankStatistics
from ...scheduler.slots.routing import Routing
from ...scheduler.sweep.sweep import SweepCounters
from ..settings.memory_budget import MemoryBudget
from ..units.expert_cuts import bytes_of
from ..units.sites import FoundUnit


@dataclass(frozen=True, kw_only=True)
class Statistics(SweepCounters):
    """Counters of one streamed model since it was loaded."""

    model_bytes: int
    """Bytes of all weights in the dtype of computing; tied weights count once."""
    device_memory_bytes: int = counter(Rule.ALIVE)
    """Bytes of the working set."""
    budget: MemoryBudget
    """How the memory of the process was divided when the model was loaded."""
    bytes_by_tier: Mapping[str, int]
    """Where the weights are: `device` (resident), `host` (read once, used where they
    lie) and `disk` (streamed)."""
    codecs: Mapping[str, int]
    """Stored bytes of the weights, by what decodes them: `int4`, `float8_e4m3fn`,
    `lossless`, ...; `cast` for another dtype, `none` for those that are used as they
    are stored."""
    reader: str
    """How files are read: `libaio`, `threads`, ..."""
    bytes_read: Mapping[str, int] = counter(Rule.SUM, dict)
    """Bytes read from each tier, alignment and gaps included."""
    bytes_shared: int = counter(Rule.SUM)
    """Bytes that came from other workers, which had read them from disk (`read_once`);
    they are not in `bytes_read`."""
    bytes_loaded: int = counter(Rule.SUM)
    """Checkpoint bytes of the units that were loaded, counted at each load."""
    bytes_gathered: int = counter(Rule.SUM)
    """Bytes of embedding rows that were read from the file, row by row."""
    bytes_copied: int = counter(Rule.SUM)
    """Bytes that the CPU copied while loading: what a codec decodes, assembled
    parameters."""
    passes: int = counter(Rule.SUM)
    wait_seconds: float = counter(Rule.MEAN, 0.0)
    """Time that computing waited for weights to be loaded."""
    compute_seconds: float = counter(Rule.MEAN, 0.0)
    """Time spent in the model's own code."""
    peak_device_bytes: int = counter(Rule.ALIVE)
    """The most bytes of the working set in use at one time."""
    peak_host_bytes: int = counter(Rule.ALIVE)
    """The largest resident set of this process, activations included."""
    kv: KvStatistics = field(default_factory=KvStatistics)
    """Keys and values that are kept in tiers; see `kv` in the policy."""
    ranks: RankStatistics = field(default_factory=RankStatistics)
    """What this rank and others have sent, where several share the model."""
    num_unused_loads: int = counter(Rule.SUM)
    """Units that were loaded ahead and evicted before anything read them."""
    expert_bytes_touched: int = counter(Rule.SUM)
    """Checkpoint bytes of experts that the device computed with, in models whose
    experts are loaded as they are chosen: counted once for all micro-batches of a
    layer."""
    expert_bytes_loaded: int = counter(Rule.SUM)
    """Checkpoint bytes of experts that were loaded."""
    host_expert_bytes: int = counter(Rule.SUM)
    """Checkpoint bytes of experts that were not loaded, since the CPU computed them
    where they lie (`experts` in the policy): counted once for all micro-batches of a
    layer."""
    host_expert_calls: int = counter(Rule.SUM)
    """How often the CPU computed an expert for the tokens of a micro-batch."""
    host_expert_tokens: int = counter(Rule.SUM)
    """Tokens of these calls. A token counts for each of its experts."""
    host_experts_exchanged: int = counter(Rule.SUM)
    """Experts, or groups of them that are loaded together, that have taken the place of
    less used ones in host memory."""
    faults: Mapping[str, int] = counter(Rule.SUM, dict)
    """How often each weight was used outside the forward of its module, by name."""
    fallbacks: tuple[str, ...] = counter(Rule.EACH, ())
    """A sentence for each thing that could not be had as it was asked for."""

    @property
    def expert_hit_rate(self) -> float:
        """The share (0 to 1) of the experts' bytes that were there already when they
        were chosen; 0 if experts are not loaded as they are chosen."""
        touched, loaded = self.expert_bytes_touched, self.expert_bytes_loaded
        return max(0.0, 1 - loaded / touched) if touched else 0.0

    @property
    def rows_per_joint_call(self) -> float:
        """The mean number of rows of a joint call; 0 if there was none."""
        return self.num_joint_rows / max(1, self.num_joint_calls)


def expert_counters(routing: Routing) -> dict[str, int]:
    """The counters of experts, by their names in `Statistics`."""
    on_host = routing.on_host
    return {
        "expert_bytes_touched": routing.touched_bytes,
        "expert_bytes_loaded": routing.loaded_bytes,
        "host_expert_bytes": on_host.nbytes,
        "host_expert_calls": on_host.num_calls,
        "host_expert_tokens": on_host.num_tokens,
        "host_experts_exchanged": on_host.num_exchanged,
    }


def bytes_by_codec(recipes: Iterable[Recipe]) -> dict[str, int]:
    """The stored bytes of the parameters, by the name of the codec that decodes them;
    `none` for those that are copied."""
    found: dict[str, int] = {}
    for recipe in recipes:
        for part in recipe.slices:
            is_copied = part.codec == CAST and part.entry.dtype == recipe.dtype
            name = "none" if is_copied else part.codec.name
            found[name] = found.get(name, 0) + part.stored_bytes
    return found


def bytes_by_tier(
    units: Sequence[FoundUnit],
    recipes: Mapping[str, Recipe],
    placement: Sequence[str],
    resident: Collection[int],
) -> dict[str, int]:
    """The bytes of the model in each of `device`, `peer`, `host` and `disk`. A unit
    counts for the tier of its `placement`, a `resident` one for `device`."""
    tier_bytes: dict[str, int] = dict.fromkeys(Tier, 0)
    for index, unit in enumerate(units):
        tier = Tier.DEVICE if index in resident else placement[index]
        tier_bytes[tier_of(tier)] += bytes_of(unit, recipes)
    placed = {name for unit in units for name in unit.tensors}
    tier_bytes[Tier.DISK] += sum(
        recipe.nbytes
        for name, recipe in recipes.items()
        if name not in placed  # embeddings whose rows are read one by one
    )
    return tier_bytes
