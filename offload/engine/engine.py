"""The engine of one streamed model, which owns all parts that stream its weights."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...io.closing import run_all
from ...io.errors import DoesNotFitError, FaultError, PenstockError
from ...io.fallbacks import Fallbacks
from ...io.kv.count import KvStatistics
from ...io.merging import counters_of
from ...io.weights.residue import clone_like, joined_like
from ...scheduler.sweep.admission import Width
from ...scheduler.sweep.coalescing import Coalescing
from ...scheduler.sweep.module_state import ModuleState
from ...scheduler.sweep.sweep import Sweep
from ...scheduler.sweep.sweeps import Sweeps
from ..experts.rank_experts import expert_ranks
from ..monitoring.heap import give_freed_back
from ..monitoring.memory import peak_resident_bytes
from ..policy import Policy
from .counters import Statistics, bytes_by_codec, bytes_by_tier, expert_counters
from .groups import Forwards, Weights
from .routed_experts import RoutedExperts
from .site_hooks import SiteHooks
from .updates import Updates

_log = logging.getLogger("penstock")


class Engine:
    """Owns all parts that stream one model: arena, reader, threads, hooks. Made by
    `build`, ended by `close`; in between the model computes as usual."""

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        *,
        weights: Weights,
        forwards: Forwards,
        fallbacks: Fallbacks,
    ) -> None:
        self.model = model
        self.policy = policy
        self.arrangement = arrangement = weights.arrangement
        self.model_division = arrangement.division.found
        self.recipes = arrangement.recipes
        assert arrangement.budget is not None, "there is room to divide"
        self.budget = arrangement.budget
        self.resident = weights.binding.resident
        self.timeline = forwards.timeline
        self.fallbacks = fallbacks
        self.row_wise = forwards.row_wise
        self.fork_guard = forwards.entry.fork_guard
        self._weights = weights
        self._forwards = forwards
        self._tiers = tiers = weights.tiers
        self._in_place = tiers.in_place.offsets if tiers.in_place is not None else {}
        self._working_set, self._binding = weights.working_set, weights.binding
        self._entry = forwards.entry
        self._compilation = forwards.compilation
        self._kv = forwards.kv
        self._faults: Counter[str] = Counter()
        self.updates = Updates(weights, forwards.entry, policy, fallbacks)
        self._sweeps = Sweeps()
        self._hooks: SiteHooks | None = None
        self.exchange, self.gathered = forwards.exchange, forwards.gathered
        self._experts: RoutedExperts | None = None
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
        compiled = self._compilation
        keep_out = compiled.keep_out if compiled else lambda hook: hook
        parts = self.model, self.model_division, self._forwards, self._binding
        self._hooks = SiteHooks(*parts, keep_out)
        if compiled is not None:
            compiled.start(self.fallbacks.announce)
        self._experts = RoutedExperts(
            self.model_division.stacks,
            self.model_division.units,
            self._entry,
            self._working_set,
            self._binding,
            self._in_place,
            self._weights.host_cache,
            expert_ranks(self.exchange),
        )
        num = min(1 + self.policy.lookahead, len(self.model_division.sites))
        self._entry.open_sites.prefetch_sites(range(num))

    def touch(self, name: str) -> torch.Tensor:
        """Returns the real tensor `name`, which was used while its unit is not bound (a
        fault). Its unit is loaded now and, if there is room, becomes resident."""
        units = self._weights.units_of[name]
        if self.model_division.units[units[0]].experts is not None:
            self._count_fault(name, units[0])
            return self._all_experts(name, units)
        (unit,) = units
        with self._entry.turn():
            if not self._working_set.is_resident(unit):
                self._count_fault(name, unit)
            try:
                return self._loaded(name, unit)
            except DoesNotFitError:  # beside the site for which a sweep is open
                with self._entry.aside():
                    return self._loaded(name, unit)

    def _loaded(self, name: str, unit: int) -> torch.Tensor:
        offset = self._working_set.acquire(unit)
        try:
            tensor = self._binding.tensors(unit, offset)[name]
            if not self._working_set.is_resident(unit):
                if not self._working_set.keep(unit):
                    # A view of a copy may be used after the slot is reused.
                    return clone_like(tensor)
                self._binding.bind_for_ever(unit, offset)
            return tensor
        finally:
            self._working_set.release(unit)

    def value_of(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """The values of the weight `name`, which an open site has as `parameter`: a
        copy of all its experts, if these are loaded one by one."""
        units = self._weights.units_of.get(name, ())
        is_cut = any(self.model_division.units[unit].experts for unit in units[:1])
        return self._all_experts(name, units) if is_cut else parameter

    def _all_experts(self, name: str, units: Sequence[int]) -> torch.Tensor:
        """A copy of the tensor `name`, all its pieces together."""
        pieces, tensors_of = [], self._binding.tensors
        with self._entry.turn():
            for unit in units:
                if unit in self._in_place:
                    pieces.append(tensors_of(unit, self._in_place[unit])[name])
                    continue
                offset = self._working_set.acquire(unit)
                try:
                    pieces.append(clone_like(tensors_of(unit, offset)[name]))
                finally:
                    self._working_set.release(unit)
        return joined_like(pieces)

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
            lockstep=None if self.exchange is None else self.exchange.new_run,
        )
        self._sweeps.add(sweep)
        return sweep

    def _coalescing(self, is_wanted: bool | None) -> Coalescing:
        """The coalescing of a sweep: none unless the policy and the caller want it."""
        if is_wanted is None:
            is_wanted = self.policy.coalesce == "on"
        if not is_wanted or self.policy.coalesce == "off":
            return Coalescing((), self._forwards.row_order, self.fallbacks)
        if self._compilation is not None:
            raise PenstockError(
                "a sweep of compiled blocks cannot be coalesced: micro-batches would "
                "have to stop inside of them; take compile: false or coalesce=False"
            )
        return Coalescing(self.row_wise, self._forwards.row_order, self.fallbacks)

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

    @property
    def device(self) -> torch.device:
        """The device on which the model computes; its inputs have to be there."""
        return torch.device(self._tiers.device.name)

    @property
    def first_unit_at(self) -> float | None:
        """When the weights of the first site were there and it began to compute
        (`time.perf_counter`); None before."""
        return self._entry.first_visit_at

    @property
    def pass_fraction(self) -> float:
        """The part of the current pass over the weights that is done, 0 to 1."""
        return self._entry.fraction

    def statistics(self) -> Statistics:
        working_set = self._working_set.statistics()
        loaders = [loader.statistics() for loader in self._tiers.loaders]
        by_tier = bytes_by_tier(
            self.model_division.units,
            self.recipes,
            self.arrangement.placement,
            working_set.resident_units,
        )
        drive, on_gpu = self._tiers.drive, self._tiers.device.peak_bytes()
        return Statistics(
            model_bytes=sum(by_tier.values()),
            device_memory_bytes=working_set.capacity_bytes,
            budget=self.budget,
            bytes_by_tier=by_tier,
            codecs=bytes_by_codec(self.recipes.values()),
            reader=drive.reader.name,
            bytes_shared=drive.bytes_shared,
            bytes_read=self._tiers.bytes_read(),
            bytes_loaded=sum(loader.bytes_loaded for loader in loaders),
            bytes_gathered=self._weights.bytes_gathered,
            bytes_copied=sum(loader.bytes_copied for loader in loaders),
            passes=self._entry.num_passes,
            wait_seconds=working_set.wait_seconds,
            compute_seconds=self._entry.compute_seconds,
            peak_device_bytes=working_set.peak_bytes if on_gpu is None else on_gpu,
            peak_host_bytes=peak_resident_bytes(),
            **counters_of(self._sweeps.counters()),
            num_unused_loads=working_set.num_unused_loads,
            **expert_counters(self._entry.open_sites.routing),
            faults=dict(self._faults),
            ranks=self._forwards.rank_statistics(),
            kv=KvStatistics() if self._kv is None else self._kv.store.statistics(),
            fallbacks=tuple(self.fallbacks),
        )

    @property
    def closers(self) -> Sequence[Callable[[], None]]:
        """Functions that close all parts that do not refer to the model, in order."""
        of_weights = self._working_set.close, self._weights.host_cache.close
        own = (*of_weights, self._tiers.close, give_freed_back)
        return (*self._forwards.closers, *own)

    def close(self) -> None:
        """Removes the hooks, ends the threads, and closes files and memory. A streamed
        weight raises an error when it is used afterwards. In a forked child this does
        nothing: all parts belong to the parent."""
        if self._is_closed or self.fork_guard.is_forked:
            return
        self._sweeps.close()
        gatherers = self._weights.gatherers.values()
        steps: list[Callable[[], object]] = [
            *self._forwards.closers,
            *([] if self._hooks is None else [self._hooks.remove]),
            *([] if self._experts is None else [self._experts.close]),
            *([] if self._compilation is None else [self._compilation.stop]),
            self._working_set.close,
            self._weights.host_cache.close,
            *(gatherer.close for gatherer in gatherers),
            self._binding.unbind_all,
            self._weights.moved.close,
            self._tiers.close,
            self.updates.close,
            give_freed_back,
        ]
        for error in run_all(steps):
            _log.warning("while the model was closed: %s", error)
        self._is_closed = True  # set last: after an interrupt, `close` runs again

    def _count_fault(self, name: str, unit: int) -> None:
        self._faults[name] += 1
        if self.policy.strict:
            where = self.model_division.units[unit].name
            raise FaultError(
                f"{name!r} was used outside of the forward of its unit {where!r}; "
                "strict: false loads it on the spot"
            )
        if self._faults[name] == 1:
            used = "%s is used outside of the forward of its module: loaded on the spot"
            _log.warning(used, name)
