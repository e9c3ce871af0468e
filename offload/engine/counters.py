"""What a streamed model has done so far, as plain numbers."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ...io.kv.count import KvStatistics
from ...io.weights.recipe import Recipe
from ..settings.memory_budget import MemoryBudget
from ..units.sites import FoundUnit


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counters of one streamed model since it was loaded."""

    model_bytes: int
    """Bytes of all the weights, tied ones once, in the dtype they compute in."""
    device_memory_bytes: int
    """The working set's budget."""
    budget: MemoryBudget
    """How the memory of the process was divided when the model was loaded."""
    bytes_by_tier: Mapping[str, int]
    """Where the weights are: `device` (resident), `host` (read once, used where they
    lie) and `disk` (streamed)."""
    reader: str
    """How files are read: `libaio`, `threads`, ..."""
    bytes_read: Mapping[str, int]
    """Bytes read from each tier, alignment and gaps included."""
    bytes_loaded: int
    """Checkpoint bytes of the units that were loaded, each counted once a load."""
    bytes_gathered: int
    """Bytes of embedding rows that were looked up in the file."""
    bytes_copied: int
    """Bytes that the CPU moved on their way: casts, assembled parameters."""
    passes: int
    wait_seconds: float
    """Time for which computing stood still because weights were not there yet."""
    compute_seconds: float
    """Time spent in the model's own code."""
    peak_device_bytes: int
    """Most bytes of the working set in use at one time."""
    peak_host_bytes: int
    """Most memory of this process at one time (resident set), activations and all."""
    max_in_flight: int
    """Most micro-batches that a sweep had under way at one time."""
    held_bytes_per_micro_batch: int
    """Activations that one suspended micro-batch keeps alive."""
    activation_bytes_out: int
    """Bytes of suspended micro-batches that were copied to host memory."""
    activation_bytes_in: int
    """Bytes of them that were copied back; less, where who left came back at once."""
    num_activation_buffers: int
    """Buffers in host memory that were allocated for that: it stands still in time."""
    num_joint_calls: int
    """Calls of a row-wise module that were made for several micro-batches at once."""
    num_joint_rows: int
    """Rows that went through modules in these calls."""
    num_failed_joint_calls: int
    """Such calls that failed, and were then made for each micro-batch by itself."""
    kv: KvStatistics
    """Keys and values that are kept in tiers; see `kv` in the policy."""
    num_unused_loads: int
    faults: Mapping[str, int]
    """Weights touched outside of their unit's forward, by name."""
    fallbacks: tuple[str, ...]
    """What could not be had as asked, each said once."""

    @property
    def rows_per_joint_call(self) -> float:
        """The mean; 0 if there was no such call."""
        return self.num_joint_rows / max(1, self.num_joint_calls)


def bytes_by_tier(
    units: Sequence[FoundUnit],
    recipes: Mapping[str, Recipe],
    placement: Sequence[str],
    resident: Collection[int],
) -> dict[str, int]:
    """Bytes of the model in `device`, `peer`, `host` and `disk`: by the tier that each
    unit is placed in, unless it is one of the `resident` ones."""
    found = dict.fromkeys(("device", "peer", "host", "disk"), 0)
    for index, unit in enumerate(units):
        tier = "device" if index in resident else placement[index]
        found[tier if tier in found else "peer"] += sum(
            recipes[name].nbytes for name in unit.tensors
        )
    placed = {name for unit in units for name in unit.tensors}
    found["disk"] += sum(
        recipe.nbytes
        for name, recipe in recipes.items()
        if name not in placed  # rows of it are looked up
    )
    return found
