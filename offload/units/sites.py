"""Finds the sites and units of any `nn.Module`.

Sites are the repeated blocks, and the embedding, head and norm around them. Reads the
module tree and changes nothing.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from .expert_stack import ExpertStack, pieces_of


@dataclass(frozen=True, slots=True)
class ParameterRef:
    """A place where a module refers to a tensor: its attribute `key`."""

    module: nn.Module
    key: str
    is_buffer: bool = False

    @property
    def requires_grad(self) -> bool:
        """Whether it is a parameter that requires gradients."""
        parameter = self.module._parameters.get(self.key)
        return parameter is not None and parameter.requires_grad


@dataclass(frozen=True, slots=True)
class FoundSite:
    """A module that runs once its units are loaded."""

    name: str
    module: nn.Module
    experts: tuple[int, int] | None = None
    """The range of experts of `module` that this site, a window, is. None for a site
    that is the whole module."""
    outer: int | None = None
    """The site that a window runs inside."""


@dataclass(frozen=True, slots=True)
class FoundUnit:
    """Tensors that are loaded together: exactly the same sites use them."""

    name: str
    tensors: tuple[str, ...]
    sites: tuple[int, ...]
    is_resident: bool
    """Whether a tensor is used outside of all sites, so that the unit must always be
    loaded."""
    experts: tuple[int, int] | None = None
    """The range of experts that this unit, a piece, has of each of its tensors. None
    for a unit of whole tensors."""


@dataclass(frozen=True, slots=True)
class DividedStack:
    """Stacked experts that are divided into windows."""

    stack: ExpertStack
    windows: tuple[tuple[int, tuple[int, ...]], ...]
    """The site of each window, and the units that are its pieces."""


@dataclass(frozen=True, slots=True)
class ModelDivision:
    """The sites of a model, in definition order, and the units that they use."""

    sites: tuple[FoundSite, ...]
    units: tuple[FoundUnit, ...]
    stacks: tuple[DividedStack, ...] = ()


def find(
    model: nn.Module,
    places: Mapping[str, list[ParameterRef]],
    nbytes: Mapping[str, int],
    gathered: frozenset[str],
    *,
    max_site_bytes: int,
    resident_below: int,
    stacks: Mapping[int, ExpertStack],
) -> ModelDivision:
    """Divides `model` into sites and units.

    `places` says where each tensor is used, by name; a tied one is used in several
    places. `nbytes` says how large it is. `gathered` are the embedding tables that are
    not loaded for their embedding. A block larger than `max_site_bytes` is divided into
    its child modules. Modules outside of blocks with fewer than `resident_below` bytes
    are resident. The `stacks` of experts, by the id of their module, are divided into
    windows, which are sites inside of the block or beside it.
    """
    names = _names(places)
    divided = {name for stack in stacks.values() for name in stack.tensors.values()}
    tree = _Tree(names, nbytes, gathered, max_site_bytes, resident_below, stacks)
    tree.divide(model)
    whole = {name: where for name, where in places.items() if name not in divided}
    units = [*_units(tree.sites, whole, gathered), *tree.pieces]
    units.sort(key=lambda unit: (not unit.is_resident, unit.sites))
    return ModelDivision(
        tuple(tree.sites), tuple(units), _divided(tree.sites, units, stacks)
    )


def _divided(
    sites: Sequence[FoundSite],
    units: Sequence[FoundUnit],
    stacks: Mapping[int, ExpertStack],
) -> tuple[DividedStack, ...]:
    pieces: dict[int, list[int]] = defaultdict(list)
    for index, unit in enumerate(units):
        if unit.experts is not None:
            pieces[unit.sites[0]].append(index)
    windows: dict[int, list[tuple[int, tuple[int, ...]]]] = defaultdict(list)
    for index, site in enumerate(sites):
        if site.experts is not None:
            windows[id(site.module)].append((index, tuple(pieces[index])))
    assert windows.keys() == stacks.keys(), "all stacks are in blocks"
    return tuple(
        DividedStack(stacks[of], tuple(found)) for of, found in windows.items()
    )


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


class _Tree:
    """Collects the sites of a model, outermost first, and the pieces of its experts."""

    def __init__(
        self,
        names: Mapping[tuple[int, str], str],
        nbytes: Mapping[str, int],
        gathered: frozenset[str],
        max_site_bytes: int,
        resident_below: int,
        stacks: Mapping[int, ExpertStack],
    ) -> None:
        self.sites: list[FoundSite] = []
        self.pieces: list[FoundUnit] = []
        self._names = names
        self._nbytes = nbytes
        self._gathered = gathered
        self._max_site_bytes = max_site_bytes
        self._resident_below = resident_below
        self._stacks = stacks
        self._divided = {n for s in stacks.values() for n in s.tensors.values()}
        self._seen: set[int] = set()

    def divide(self, model: nn.Module) -> None:
        """Finds all sites; modules that are shared are found once."""
        self._visit("", model, in_block=False)

    def _visit(self, name: str, module: nn.Module, *, in_block: bool) -> None:
        if id(module) in self._seen:
            return
        size, stacks = self._size(module), self._stacks_in(module)
        if (size == 0 and not stacks) or self._is_gathered(module):
            return
        children = [
            (n, m)
            for n, m in module.named_children()
            if self._size(m) or self._stacks_in(m)
        ]
        # A container's forward is never called, so a hook on it would never run.
        can_run = type(module).forward is not nn.Module.forward
        expert = max((stack.expert_bytes for stack in stacks), default=0)
        fits = size + expert <= self._max_site_bytes or not children
        if can_run and fits and (in_block or not children):
            self._seen.add(id(module))
            if in_block or size >= self._resident_below or stacks:
                self.sites.append(FoundSite(name, module))
                for stack in stacks:
                    self._add_windows(stack, len(self.sites) - 1, size)
            return
        in_block = in_block or _is_stack(module)
        for child_name, child in children:
            full_name = f"{name}.{child_name}" if name else child_name
            self._visit(full_name, child, in_block=in_block)

    def _add_windows(self, stack: ExpertStack, outer: int, size: int) -> None:
        """Adds the windows of `stack`, inside of a site of `size` bytes."""
        for pieces in pieces_of(stack, self._max_site_bytes - size):
            site, experts = len(self.sites), (pieces[0][0], pieces[-1][1])
            name = f"{stack.name}[{experts[0]}:{experts[1]}]"
            self.sites.append(FoundSite(name, stack.module, experts, outer))
            tensors = tuple(stack.tensors.values())
            self.pieces += (
                FoundUnit(f"{stack.name}[{a}:{b}]", tensors, (site,), False, (a, b))
                for a, b in pieces
            )

    def _stacks_in(self, module: nn.Module) -> list[ExpertStack]:
        if not self._stacks:
            return []
        stacks = self._stacks
        return [stacks[id(m)] for m in module.modules() if id(m) in stacks]

    def _size(self, module: nn.Module) -> int:
        names = tensors_in(module, self._names)
        return sum(self._nbytes[name] for name in names if name not in self._divided)

    def _is_gathered(self, module: nn.Module) -> bool:
        name = self._names.get((id(module), "weight"))
        return isinstance(module, nn.Embedding) and name in self._gathered


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
    sites: Sequence[FoundSite],
    places: Mapping[str, list[ParameterRef]],
    gathered: frozenset[str],
) -> tuple[FoundUnit, ...]:
    """Groups the tensors by the set of sites that use them."""
    inside: dict[tuple[int, str], list[int]] = defaultdict(list)
    for index, site in enumerate(sites):
        if site.experts is not None:
            continue
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
    sites: Sequence[FoundSite],
    used: tuple[int, ...],
    tensors: list[str],
    is_resident: bool,
) -> str:
    if is_resident:
        return "resident"
    if used[0] < 0:
        return tensors[0]
    return " + ".join(sites[site].name or "model" for site in used)
