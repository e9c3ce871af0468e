"""Finds the sites and units of any `nn.Module`.

Sites are the repeated blocks, and the embedding, head and norm around them. Reads the
module tree and changes nothing.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True)
class ParameterRef:
    """A place where a module refers to a tensor: its attribute `key`."""

    module: nn.Module
    key: str
    is_buffer: bool = False


@dataclass(frozen=True, slots=True)
class FoundSite:
    """A module that runs once its units are loaded."""

    name: str
    module: nn.Module


@dataclass(frozen=True, slots=True)
class FoundUnit:
    """Tensors that are loaded together: exactly the same sites use them."""

    name: str
    tensors: tuple[str, ...]
    sites: tuple[int, ...]
    is_resident: bool
    """Whether a tensor is used outside of all sites, so that the unit must always be
    loaded."""


@dataclass(frozen=True, slots=True)
class ModelDivision:
    """The sites of a model, in definition order, and the units that they use."""

    sites: tuple[FoundSite, ...]
    units: tuple[FoundUnit, ...]


def find(
    model: nn.Module,
    places: Mapping[str, list[ParameterRef]],
    nbytes: Mapping[str, int],
    gathered: frozenset[str],
    *,
    max_site_bytes: int,
    resident_below: int,
) -> ModelDivision:
    """Divides `model` into sites and units.

    `places` says where each tensor is used, by name; a tied one is used in several
    places. `nbytes` says how large it is. `gathered` are the embedding tables that are
    not loaded for their embedding. A block larger than `max_site_bytes` is divided into
    its child modules. Modules outside of blocks with fewer than `resident_below` bytes
    are resident.
    """
    names = _names(places)
    tree = _Tree(names, nbytes, gathered, max_site_bytes, resident_below)
    sites = tuple(tree.sites("", model, in_block=False))
    return ModelDivision(sites, _units(sites, places, names, gathered))


def module_sizes(
    model: nn.Module,
    places: Mapping[str, list[ParameterRef]],
    nbytes: Mapping[str, int],
) -> set[int]:
    """The sizes in bytes of the modules of `model`, which `find` compares with its
    limits."""
    names = _names(places)
    return {
        sum(nbytes[name] for name in tensors_in(module, names))
        for module in model.modules()
    }


def _names(places: Mapping[str, list[ParameterRef]]) -> dict[tuple[int, str], str]:
    return {(id(p.module), p.key): name for name, ps in places.items() for p in ps}


@dataclass(frozen=True, slots=True)
class _Tree:
    names: Mapping[tuple[int, str], str]
    nbytes: Mapping[str, int]
    gathered: frozenset[str]
    max_site_bytes: int
    resident_below: int

    def sites(
        self, name: str, module: nn.Module, in_block: bool
    ) -> Iterator[FoundSite]:
        """The sites at or below `module`, outermost first; shared modules once."""
        yield from self._sites(name, module, in_block, set())

    def _sites(
        self, name: str, module: nn.Module, in_block: bool, seen: set[int]
    ) -> Iterator[FoundSite]:
        if id(module) in seen:
            return
        size = self._size(module)
        if size == 0 or self._is_gathered(module):
            return
        children = [(n, m) for n, m in module.named_children() if self._size(m)]
        # A container's forward is never called, so a hook on it would never run.
        can_run = type(module).forward is not nn.Module.forward
        fits = size <= self.max_site_bytes or not children
        if can_run and fits and (in_block or not children):
            seen.add(id(module))
            if in_block or size >= self.resident_below:
                yield FoundSite(name, module)
            return
        in_block = in_block or _is_stack(module)
        for child_name, child in children:
            full_name = f"{name}.{child_name}" if name else child_name
            yield from self._sites(full_name, child, in_block, seen)

    def _size(self, module: nn.Module) -> int:
        return sum(self.nbytes[name] for name in tensors_in(module, self.names))

    def _is_gathered(self, module: nn.Module) -> bool:
        name = self.names.get((id(module), "weight"))
        return isinstance(module, nn.Embedding) and name in self.gathered


def tensors_in(
    module: nn.Module, names: Mapping[tuple[int, str], str]
) -> dict[str, None]:
    """The names of the parameters used in `module`, each once, in order."""
    found: dict[str, None] = {}
    for part in module.modules():
        for key in part._parameters:
            if (name := names.get((id(part), key))) is not None:
                found[name] = None
    return found


def _is_stack(module: nn.Module) -> bool:
    """Whether the children of `module` are blocks, run one after the other."""
    if isinstance(module, nn.ModuleList):
        return True
    kinds = {type(child) for child in module.children()}
    return isinstance(module, nn.Sequential) and len(module) > 1 and len(kinds) == 1


def _units(
    sites: tuple[FoundSite, ...],
    places: Mapping[str, list[ParameterRef]],
    names: Mapping[tuple[int, str], str],
    gathered: frozenset[str],
) -> tuple[FoundUnit, ...]:
    """Groups the tensors by the set of sites that use them."""
    inside: dict[tuple[int, str], list[int]] = defaultdict(list)
    for index, site in enumerate(sites):
        for part in site.module.modules():
            for key in part._parameters:
                inside[id(part), key].append(index)
    groups: dict[tuple[tuple[int, ...], bool], list[str]] = defaultdict(list)
    for name, where in places.items():
        used: set[int] = set()
        is_resident = False
        for place in where:
            at = inside.get((id(place.module), place.key), [])
            used.update(at)
            is_gather = name in gathered and isinstance(place.module, nn.Embedding)
            is_resident = is_resident or not (at or is_gather)
        # Buffers are always resident. So are tensors that no site uses; they form one
        # unit.
        if is_resident:
            groups[(), True].append(name)
        elif used:
            groups[tuple(sorted(used)), False].append(name)
        else:  # only gathered: a separate unit, which a fault may load
            groups[(-1 - len(groups),), False].append(name)
    ordered = sorted(groups.items(), key=lambda item: (not item[0][1], item[0][0]))
    return tuple(
        FoundUnit(
            _unit_name(sites, used, tensors, is_resident),
            tuple(tensors),
            tuple(site for site in used if site >= 0),
            is_resident,
        )
        for (used, is_resident), tensors in ordered
    )


def _unit_name(
    sites: tuple[FoundSite, ...],
    used: tuple[int, ...],
    tensors: list[str],
    is_resident: bool,
) -> str:
    if is_resident:
        return "resident"
    if used[0] < 0:
        return tensors[0]
    return " + ".join(sites[site].name or "model" for site in used)
