"""Plans how units lie in files and slots; units that are alike share a plan."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

from ...io.weights.layout import Layout, Placed, layout
from ...io.weights.recipe import Recipe
from ...io.weights.steps import LoadSteps
from ...io.weights.stored_image import StoredImage, stored_image
from ...io.weights.transfer import Transfer
from .expert_cuts import cut, piece_recipes, slices_of_pieces
from .expert_stack import ExpertStack
from .likeness import likeness, made_alike, places_alike
from .sites import FoundUnit, ModelDivision, pieces_in


@dataclass(frozen=True, slots=True)
class _Plan:
    """The plan of one unit."""

    kind: int
    """The number of its kind; units of one kind are alike."""
    recipes: Callable[[], Sequence[Recipe]]
    layout: Layout
    transfer: Transfer


@dataclass(frozen=True)
class UnitPlans:
    """The plans of all units that a model has been divided into so far.

    Blocks and experts are thousands of units, most of them alike: their tensors lie in
    the same way, at other places in files. What they have in common is worked out once,
    and the rest when a unit is loaded.
    """

    recipes: Mapping[str, Recipe]
    transfer_of: Callable[[Layout], Transfer]
    max_gap: int
    alignment: int
    """The alignment of offsets and sizes of reads, and of slots, in bytes."""
    memory_alignment: int
    """The alignment of the addresses that are read to, in bytes."""
    tensor_alignment: int
    """The alignment of assembled tensors in memory that units are read to, in bytes."""
    _plans: dict[Hashable, _Plan] = field(default_factory=dict)
    """The plan of each unit, whatever its sites."""
    _first: dict[Hashable, _Plan] = field(default_factory=dict)
    """The first plan of each kind, by what units of that kind have in common."""
    _pieces: dict[Hashable, list[_Plan]] = field(default_factory=dict)
    """The plans of all pieces of the first stack of experts of each kind, where stored
    tensors have experts of several pieces."""
    _stacks: list[tuple[Hashable, list[int]]] = field(default_factory=list)
    """What stacks are made of, and the numbers of what their pieces are made of, where
    these have stored tensors of their own. There are few, and comparing them is faster
    than hashing."""
    _made: dict[Hashable, int] = field(default_factory=dict)
    """The number of each thing that pieces are made of."""
    _placed: dict[Hashable, tuple[tuple[Placed, ...], ...]] = field(
        default_factory=dict
    )
    """Where tensors lie as they are read, and in a slot, by their kind and names."""
    _sizes: dict[Hashable, tuple[int, ...]] = field(default_factory=dict)
    """The bytes of the pieces of stacks in their slots."""
    _images: dict[Hashable, StoredImage] = field(default_factory=dict)
    """The image of each unit, and the first one of each kind, by its number."""

    def plans(self, found: ModelDivision) -> tuple[list[Layout], list[Transfer]]:
        """How each unit of `found` is laid out as it is read, and in its slot."""
        for each in found.stacks:
            units = [found.units[unit] for _, units in each.windows for unit in units]
            self._plan_pieces(units)
        plans = [self._plan(unit) for unit in found.units]
        return [plan.layout for plan in plans], [plan.transfer for plan in plans]

    def size(self, unit: FoundUnit) -> int:
        """The bytes of `unit`, of whole tensors, in its slot."""
        return self._plan(unit).transfer.nbytes

    def piece_sizes(
        self, stack: ExpertStack, experts: tuple[tuple[int, int], ...]
    ) -> tuple[int, ...]:
        """The bytes of all pieces of `stack`, the ranges `experts`, in their slots."""
        key = stack.name, experts
        if key not in self._sizes:
            units = pieces_in(stack, experts, ())
            self._plan_pieces(units)
            self._sizes[key] = tuple(map(self.size, units))
        return self._sizes[key]

    def image(self, unit: FoundUnit) -> StoredImage:
        """How memory can keep `unit` as its files have it."""
        key = _key(unit)
        if key not in self._images:
            self._images[key] = self._image(unit)
        return self._images[key]

    def _image(self, unit: FoundUnit) -> StoredImage:
        plan = self._plan(unit)
        slot = plan.transfer

        def image() -> StoredImage:
            recipes, align = plan.recipes(), self.alignment
            return stored_image(
                unit.name, recipes, slot, alignment=align, max_gap_bytes=0
            )

        first = self._images.get(plan.kind)
        if first is None:
            first = self._images[plan.kind] = image()
            return first
        return StoredImage(
            _moved(first.layout, unit.name, (), lambda: image().layout.steps),
            _renamed(first.transfer, unit.name, slot.tensors),
        )

    def _plan(self, unit: FoundUnit) -> _Plan:
        key = _key(unit)
        if key not in self._plans:
            recipes = [self.recipes[name] for name in unit.tensors]
            kind = self._likeness(recipes)
            self._plans[key] = self._as_one_alike(unit, kind, lambda: recipes)
        return self._plans[key]

    def _plan_pieces(self, units: Sequence[FoundUnit]) -> None:
        """Plans the pieces of one stack of experts, unless that is done."""
        if _key(units[0]) in self._plans:
            return
        wholes = [self.recipes[name] for name in units[0].tensors]
        bounds = [unit.experts for unit in units if unit.experts is not None]
        slices = slices_of_pieces(wholes, bounds)
        if slices is None:
            plans = self._plan_cut(units, wholes, bounds)
        else:
            makers = [
                partial(piece_recipes, wholes, *piece)
                for piece in zip(bounds, slices, strict=True)
            ]
            places = places_alike(
                slices, alignment=self.alignment, max_gap_bytes=self.max_gap
            )
            kinds = zip(self._made_of(wholes, bounds, makers), places, strict=True)
            plans = list(map(self._as_one_alike, units, kinds, makers))
        self._plans.update(zip(map(_key, units), plans, strict=True))

    def _plan_cut(
        self,
        units: Sequence[FoundUnit],
        wholes: Sequence[Recipe],
        bounds: Sequence[tuple[int, int]],
    ) -> list[_Plan]:
        """The plans of pieces that share stored tensors."""
        pieces = cache(partial(_pieces, wholes, bounds))
        key = self._likeness(wholes), tuple(bounds)
        makers = [partial(_item, pieces, index) for index in range(len(units))]
        first = self._pieces.get(key)
        if first is None:
            kinds = map(self._likeness, pieces())
            first = list(map(self._as_one_alike, units, kinds, makers))
            self._pieces[key] = first
            return first
        return list(map(self._like, first, units, makers))

    def _made_of(
        self,
        wholes: Sequence[Recipe],
        bounds: Sequence[tuple[int, int]],
        makers: Sequence[Callable[[], Sequence[Recipe]]],
    ) -> list[int]:
        """The number of what each piece of a stack is made of."""
        stack = made_alike(wholes), tuple(bounds)
        found = next((made for known, made in self._stacks if known == stack), None)
        if found is None:
            made = (made_alike(make()) for make in makers)
            found = [self._made.setdefault(each, len(self._made)) for each in made]
            self._stacks.append((stack, found))
        return found

    def _as_one_alike(
        self, unit: FoundUnit, kind: Hashable, recipes: Callable[[], Sequence[Recipe]]
    ) -> _Plan:
        """Takes the plan of a unit that is like `unit`, if there is one."""
        key = kind, unit.is_resident
        first = self._first.get(key)
        if first is not None:
            return self._like(first, unit, recipes)
        own = self._layout(unit, recipes())
        number, slot = len(self._first), self.transfer_of(own)
        self._first[key] = _Plan(number, recipes, own, slot)
        return self._first[key]

    def _like(
        self, plan: _Plan, unit: FoundUnit, recipes: Callable[[], Sequence[Recipe]]
    ) -> _Plan:
        """`plan` for a `unit` that is alike, and is made by other `recipes`."""
        layout, slot = plan.layout, plan.transfer
        key = plan.kind, unit.tensors
        if key not in self._placed:
            wholes = layout.tensors, slot.tensors
            self._placed[key] = tuple(_under(unit.tensors, each) for each in wholes)
        read, ready = self._placed[key]
        return _Plan(
            plan.kind,
            recipes,
            _moved(
                layout,
                unit.name,
                read,
                lambda: self._layout(unit, recipes()).steps,
            ),
            _renamed(slot, unit.name, ready),
        )

    def _likeness(self, recipes: Sequence[Recipe]) -> Hashable:
        return likeness(recipes, alignment=self.alignment, max_gap_bytes=self.max_gap)

    def _layout(self, unit: FoundUnit, recipes: Sequence[Recipe]) -> Layout:
        return layout(
            unit.name,
            recipes,
            alignment=self.alignment,
            memory_alignment=self.memory_alignment,
            tensor_alignment=self.tensor_alignment,
            # A unit that is read once may take more reads, but should have no gaps.
            max_gap_bytes=0 if unit.is_resident else self.max_gap,
        )


def _key(unit: FoundUnit) -> Hashable:
    return unit.name, unit.tensors, unit.is_resident


def _pieces(
    recipes: Sequence[Recipe], bounds: Sequence[tuple[int, int]]
) -> Sequence[Sequence[Recipe]]:
    return list(zip(*(cut(recipe, bounds) for recipe in recipes), strict=True))


def _item(
    pieces: Callable[[], Sequence[Sequence[Recipe]]], index: int
) -> Sequence[Recipe]:
    return pieces()[index]


def _moved(
    plan: Layout,
    name: str,
    tensors: tuple[Placed, ...],
    steps: Callable[[], LoadSteps],
) -> Layout:
    """`plan` for a unit `name` that is alike: other `tensors`, from other places."""
    return Layout(
        name,
        plan.nbytes,
        tensors,
        plan.stored_bytes,
        plan.decoded,
        plan.uses_kernels,
        steps,
    )


def _renamed(plan: Transfer, name: str, tensors: tuple[Placed, ...]) -> Transfer:
    return Transfer(
        name, plan.nbytes, plan.runs, tensors, plan.stored_bytes, plan.decodes
    )


def _under(names: Sequence[str], tensors: Sequence[Placed]) -> tuple[Placed, ...]:
    """`tensors` under other `names`."""
    return tuple(
        Placed(name, each.offset, each.dtype, each.shape, each.fragments)
        for name, each in zip(names, tensors, strict=True)
    )
