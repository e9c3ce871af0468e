"""The engine of one streamed model, which owns all parts that stream its weights."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...io.errors import FaultError, PenstockError
from ...io.kv.count import KvStatistics
from ...io.timeline import Timeline
from ...io.weights.residue import clone_like
from ...scheduler.order import Order
from ...scheduler.slots.open_sites import OpenSites
from ...scheduler.slots.working_set import WorkingSet
from ...scheduler.sweep.admission import Width
from ...scheduler.sweep.coalescing import Coalescing, RowWise
from ...scheduler.sweep.entry import ForwardEntry
from ...scheduler.sweep.module_state import ModuleState
from ...scheduler.sweep.sweep import Sweep
from ..kv.tiers import KvTiers
from ..monitoring.heap import give_freed_back
from ..monitoring.memory import peak_resident_bytes
from ..policy import Policy
from ..settings.memory_budget import MemoryBudget
from ..units.arrangement import Arrangement
from ..weights.binding import Binding
from ..weights.moved_tensors import MovedTensors
from ..weights.row_gatherer import RowGatherer
from .counters import Statistics, bytes_by_tier
from .site_hooks import SiteHooks
from .sweeps import Sweeps
from .tiers import Tiers
from .updates import Updates

if TYPE_CHECKING:
    from .compilation import Compilation

_log = logging.getLogger("penstock")


class Engine:
    """Owns all parts that stream one model: arena, reader, threads, hooks. Made by
    `build`, ended by `close`; in between the model computes as usual."""

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        *,
        arrangement: Arrangement,
        budget: MemoryBudget,
        tiers: Tiers,
        moved: MovedTensors,
        working_set: WorkingSet,
        binding: Binding,
        open_sites: OpenSites,
        entry: ForwardEntry,
        gatherers: Sequence[RowGatherer],
        fallbacks: Sequence[str],
        compilation: "Compilation | None",
        row_wise: Sequence[RowWise],
        row_order: Order,
        kv: KvTiers | None,
        timeline: Timeline,
    ) -> None:
        self.model = model
        self.policy = policy
        self.arrangement = arrangement
        self.model_division = model_division = arrangement.division.found
        self.recipes = arrangement.recipes
        self.budget = budget
        self.timeline = timeline
        self._tiers = tiers
        self._moved = moved
        self._working_set = working_set
        self._binding = binding
        self.resident = binding.resident
        self._open_sites = open_sites
        self._entry = entry
        self.fork_guard = entry.fork_guard
        self._gatherers = gatherers
        self._fallbacks = list(fallbacks)
        self._compilation = compilation
        self.row_wise = row_wise
        self._row_order = row_order
        self._kv = kv
        self._faults: Counter[str] = Counter()
        self._unit_of = {
            name: index
            for index, unit in enumerate(model_division.units)
            for name in unit.tensors
        }
        self.updates = Updates(
            arrangement, tiers, working_set, binding, entry, gatherers, policy
        )
        self._sweeps = Sweeps()
        self._hooks: SiteHooks | None = None
        self._is_closed = False

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "open"
        return f"<Engine: {type(self.model).__name__}, {state}>"

    def start(self) -> None:
        """Loads the resident units, registers hooks, prefetches the first sites."""
        for index, unit in enumerate(self.model_division.units):
            if unit.is_resident:
                offset = self._working_set.acquire(index)
                self._working_set.keep(index)
                self._binding.bind_for_ever(index, offset)
        self._binding.bind_host()
        keep_out = (
            self._compilation.keep_out if self._compilation else lambda hook: hook
        )
        self._hooks = SiteHooks(
            self.model, self.model_division, self._entry, self._binding, keep_out
        )
        if self._compilation is not None:
            self._compilation.start(self.note)
        self._open_sites.prefetch_sites(
            range(min(1 + self.policy.lookahead, len(self.model_division.sites)))
        )

    def touch(self, name: str) -> torch.Tensor:
        """Returns the real tensor `name`, which was used while its unit is not bound (a
        fault). Its unit is loaded now and, if there is room, becomes resident."""
        unit = self._unit_of[name]
        with self._entry.turn():
            if not self._working_set.is_resident(unit):
                self._count_fault(name, unit)
            offset = self._working_set.acquire(unit)
            try:
                tensor = self._binding.tensors(unit, offset)[name]
                if self._working_set.is_resident(unit):
                    return tensor
                if self._working_set.keep(unit):
                    self._binding.bind_for_ever(unit, offset)
                    return tensor
                # Returns a copy: a view of it may be used after the slot is reused.
                with torch.inference_mode(False):
                    return clone_like(tensor.detach())
            finally:
                self._working_set.release(unit)

    def sweep(
        self, width: Width, seed: int | None, *, coalesce: bool | None = None
    ) -> Sweep:
        """Opens a sweep over this model. `close` closes it, too."""
        moves_out = self.policy.activations == "host"
        sweep = Sweep(
            self._entry,
            width=width,
            activation_bytes=self._activation_bytes(isinstance(width, int)),
            seed=seed,
            devices=tuple(dict.fromkeys(("cpu", self._tiers.device.name))),
            module_state=ModuleState(self.model.modules()),
            activation_offload=self._tiers.activation_offload() if moves_out else None,
            coalescing=self._coalescing(coalesce),
            kv=None if self._kv is None else self._kv.store,
        )
        self._sweeps.add(sweep)
        return sweep

    def _coalescing(self, is_wanted: bool | None) -> Coalescing:
        """The coalescing of a sweep: none unless the policy and the caller want it."""
        if is_wanted is None:
            is_wanted = self.policy.coalesce == "on"
        if not is_wanted or self.policy.coalesce == "off":
            return Coalescing((), self._row_order)
        if self._compilation is not None:
            raise PenstockError(
                "a sweep of compiled blocks cannot be coalesced: micro-batches would "
                "have to stop inside of them; take compile: false or coalesce=False"
            )
        return Coalescing(self.row_wise, self._row_order)

    def _activation_bytes(self, has_width: bool) -> int | None:
        """The bytes that suspended micro-batches may hold; None: width bounds them."""
        if self.policy.activation_memory != "auto":
            return self.policy.activation_memory
        on_gpu = self._tiers.device.free_bytes()
        if on_gpu is None or self.policy.activations == "host":
            return self.budget.limit(has_width=has_width)
        return None if has_width else on_gpu // 4

    def name_of(self, parameters: Mapping[str, Any], key: str) -> str:
        """The name of the tensor that a module's `parameters` hold under `key`."""
        return self._binding.name_of(parameters, key)

    def note(self, fallback: str) -> None:
        """Logs, once, a setting of the policy that could not be followed."""
        if fallback not in self._fallbacks:
            self._fallbacks.append(fallback)
            _log.warning(fallback)

    @property
    def device(self) -> torch.device:
        """The device on which the model computes; its inputs have to be there."""
        return torch.device(self._tiers.device.name)

    @property
    def first_unit_at(self) -> float | None:
        """When the first site began to compute (`time.perf_counter`); None before."""
        return self._entry.first_visit_at

    @property
    def pass_fraction(self) -> float:
        """The part of the current pass over the weights that is done, 0 to 1."""
        return self._entry.fraction

    def statistics(self) -> Statistics:
        working_set = self._working_set.statistics()
        reader = self._tiers.reader.statistics()
        loaders = [loader.statistics() for loader in self._tiers.loaders]
        by_tier = bytes_by_tier(
            self.model_division.units,
            self.recipes,
            self._tiers.placement,
            working_set.resident_units,
        )
        on_gpu = self._tiers.device.peak_bytes()
        sweeps = self._sweeps.statistics()
        kv = None if self._kv is None else self._kv.store
        return Statistics(
            model_bytes=sum(by_tier.values()),
            device_memory_bytes=working_set.capacity_bytes,
            budget=self.budget,
            bytes_by_tier=by_tier,
            reader=reader.name,
            bytes_read=self._tiers.bytes_read(),
            bytes_loaded=sum(loader.bytes_loaded for loader in loaders),
            bytes_gathered=sum(g.bytes_gathered for g in self._gatherers),
            bytes_copied=sum(x.bytes_copied + x.bytes_converted for x in loaders),
            passes=self._entry.num_passes,
            wait_seconds=working_set.wait_seconds,
            compute_seconds=self._entry.compute_seconds,
            peak_device_bytes=working_set.peak_bytes if on_gpu is None else on_gpu,
            peak_host_bytes=peak_resident_bytes(),
            max_in_flight=sweeps.max_in_flight,
            held_bytes_per_micro_batch=sweeps.held_bytes_per_micro_batch,
            activation_bytes_out=sweeps.bytes_out,
            activation_bytes_in=sweeps.bytes_in,
            num_activation_buffers=sweeps.num_buffers,
            num_joint_calls=sweeps.num_joint_calls,
            num_joint_rows=sweeps.num_joint_rows,
            num_failed_joint_calls=sweeps.num_failed_joint_calls,
            num_unused_loads=working_set.num_unused_loads,
            faults=dict(self._faults),
            kv=KvStatistics() if kv is None else kv.statistics(),
            fallbacks=(
                *self._fallbacks,
                *self._tiers.fallbacks,
                *reader.fallbacks,
                *(kv.fallbacks if kv is not None else ()),
            ),
        )

    @property
    def closers(self) -> Sequence[Callable[[], None]]:
        """Functions that close all parts that do not refer to the model, in order."""
        kv = () if self._kv is None else (self._kv.close,)
        return (*kv, self._working_set.close, self._tiers.close, give_freed_back)

    def close(self) -> None:
        """Removes the hooks, ends the threads, and closes files and memory. A streamed
        weight raises an error when it is used afterwards. In a forked child this does
        nothing: all parts belong to the parent."""
        if self._is_closed or self.fork_guard.is_forked:
            return
        self._sweeps.close()
        if self._kv is not None:
            self._kv.close()
        if self._hooks is not None:
            self._hooks.remove()
        if self._compilation is not None:
            self._compilation.stop()
        self._working_set.close()
        for gatherer in self._gatherers:
            gatherer.close()
        self._binding.unbind_all()
        self._moved.close()
        self._tiers.close()
        self.updates.close()
        give_freed_back()
        self._is_closed = True  # set last: after an interrupt, `close` runs again

    def _count_fault(self, name: str, unit: int) -> None:
        self._faults[name] += 1
        if self.policy.strict:
            raise FaultError(
                f"{name!r} was used outside of the forward of its unit "
                f"{self.model_division.units[unit].name!r}; strict: false loads it on "
                "the spot"
            )
        if self._faults[name] == 1:
            used = "%s is used outside of the forward of its module: loaded on the spot"
            _log.warning(used, name)
