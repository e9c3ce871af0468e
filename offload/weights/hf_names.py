"""Finds out which stored tensors make which tensor of a transformers model, and how.

transformers renames, merges and splits tensors when it loads them. Its own mapping is
used here, so each checkpoint that it can load is loaded in the same way.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from ...io.checkpoint.index import Checkpoint
from ...io.weights.recipe import Recipe, plain
from .conversions import Places, Target, check_shape, converted
from .dequantising import Dequantising, is_dequantised
from .dtype_plan import DtypePlan

_COMPONENT = re.compile(r"(?<![^.])[0-9]+(?![^.])")
"""A number between the dots of a name: of a block, of an expert."""
_ESCAPE = re.compile(r"\\[a-zA-Z]")
_LOOSE_DIGIT = re.compile("(?<![a-zA-Z_0-9])[0-9]")
"""A digit of a pattern that may match in a number between dots."""
_NUMBER = re.compile("[0-9]+")
_EXPERTS = ".experts."
_Expert = tuple[str, int, str]
"""What experts of a block have in common in their names: what stands before the number
of the expert, how many digits that has, and what stands behind it."""


def make_recipes(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    quantizer: Any = None,
    places: Places | None = None,
) -> tuple[dict[str, Recipe], dict[str, str]]:
    """How to make each parameter and persistent buffer of `model` from `checkpoint`.

    Returns the recipes, by name in the model, for all tensors that the checkpoint
    holds; and the stored tensors that the model does not have: their names in the
    files, by the names that they would have in the model. `quantizer` is transformers'
    own (see `dequantizer_of`), if the checkpoint is quantised.
    """
    state: dict[str, torch.Tensor] = model.state_dict()
    names = _Names(model, state, quantizer)
    dtypes = DtypePlan(model, dtype)
    recipes: dict[str, Recipe] = {}
    targets: dict[str, Target] = {}
    unknown: dict[str, str] = {}
    for stored in _in_natural_order(checkpoint.entries):
        entry = checkpoint.entries[stored]
        name, pattern = names.of(stored)
        if name not in state:
            unknown[name] = stored  # transformers ignores it
            continue
        if pattern is None:
            recipes[name] = plain(entry, name=name, dtype=dtypes.of(name, state[name]))
            check_shape(recipes[name], state[name], entry)
        else:
            target = targets.get(name)
            if target is None:
                converter = names.converters[pattern]
                target = targets[name] = Target(converter, defaultdict(list))
            target.sources[pattern].append(entry)
    places = places or Places(model)
    dequantising = Dequantising(places, state, dtypes)
    for name, target in targets.items():
        if is_dequantised(target):
            made = dequantising.recipes_of(name, target)
        else:
            made = converted(places, name, target, state, dtypes)
        recipes.update((recipe.name, recipe) for recipe in made)
    if not unknown:
        return recipes, {}
    used = {entry.name for recipe in recipes.values() for entry in recipe.entries}
    return recipes, {name: s for name, s in unknown.items() if s not in used}


class _Names:
    """Tells what transformers calls a stored tensor, and how it is converted.

    Each pattern is tried on one name of a kind only: names that differ in the numbers
    between their dots (the same weight of other blocks and experts) match the same
    ones, unless a pattern has such a number in it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        state: dict[str, torch.Tensor],
        quantizer: Any,
    ) -> None:
        mapping = get_model_conversion_mapping(model, None, quantizer)
        self._prefix = model.base_model_prefix
        self._state = state
        self._renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        self._converters = [m for m in mapping if isinstance(m, WeightConverter)]
        self.converters = {p: c for c in self._converters for p in c.source_patterns}
        """The converters, by source pattern."""
        self._sees_numbers = any(map(_sees_numbers, mapping))
        self._kinds: dict[str, _Kind] = {}
        self._experts: dict[_Expert, tuple[str, str | None] | None] = {}
        self._in_state: dict[str, str] = {}

    def of(self, stored: str) -> tuple[str, str | None]:
        """The name of the tensor `stored` in the model, and the source pattern of the
        converter that it goes through; None if it goes through none."""
        name, pattern = self._of_expert(stored) or self._renamed(stored)
        if name not in self._in_state:
            self._in_state[name] = self._prefixed(name)
        name = self._in_state[name]
        if name not in self._state and stored in self._state:
            return self._prefixed(stored), None
        return name, pattern

    def _of_expert(self, stored: str) -> tuple[str, str | None] | None:
        """The same for a tensor of one expert, if all experts of its block become one
        tensor; None otherwise."""
        before, is_expert, rest = stored.partition(_EXPERTS)
        number, _, after = rest.partition(".")
        if not is_expert or self._sees_numbers or not _NUMBER.fullmatch(number):
            return None
        key = before, len(number), after
        if key not in self._experts:
            other = ("8" if number[0] == "9" else "9") * len(number)
            found = self._renamed(stored)
            same = self._renamed(f"{before}{_EXPERTS}{other}.{after}")
            self._experts[key] = found if found == same else None
        return self._experts[key]

    def _prefixed(self, name: str) -> str:
        found, _ = rename_source_key(name, [], [], self._prefix, self._state)
        return found

    def _renamed(self, stored: str) -> tuple[str, str | None]:
        if self._sees_numbers:
            return rename_source_key(stored, self._renamings, self._converters)
        key = _kind_of(stored)
        kind = self._kinds.get(key)
        if kind is not None:
            name, pattern = rename_source_key(stored, kind.renamings, kind.converters)
            if _kind_of(name) == kind.name:
                return name, pattern
        found = rename_source_key(stored, self._renamings, self._converters)
        if kind is None:
            self._kinds[key] = self._kind(stored, found)
        return found

    def _kind(self, stored: str, found: tuple[str, str | None]) -> "_Kind":
        """What matches `stored`, which becomes `found`."""
        name, pattern = found
        renamings = []
        for renaming in self._renamings:
            stored, match = renaming.rename_source_key(stored)
            if match is not None:
                renamings.append(renaming)
        converters = [] if pattern is None else [self.converters[pattern]]
        return _Kind(_kind_of(name), renamings, converters)


@dataclass(frozen=True)
class _Kind:
    """What happens to stored tensors whose names differ in their numbers."""

    name: str
    """The kind of their names in the model."""
    renamings: list[WeightRenaming]
    """Those that match it, one after the other."""
    converters: list[WeightConverter]


def _sees_numbers(transform: Any) -> bool:
    """Whether `transform` may treat names differently that differ in their numbers."""
    texts = [
        *transform.source_patterns,
        transform.scope_prefix or "",
        transform.base_model_prefix or "",
    ]
    literal = (_ESCAPE.sub(".", text) for text in texts)
    is_known = type(transform) in (WeightRenaming, PrefixChange, WeightConverter)
    return not is_known or any(map(_LOOSE_DIGIT.search, literal))


def _kind_of(name: str) -> str:
    """`name` with zeros for the digits of its numbers: patterns may count digits."""
    return _COMPONENT.sub(lambda match: "0" * len(match[0]), name)


def _in_natural_order(names: Iterable[str]) -> list[str]:
    """`names` in the order in which transformers converts them: the ninth before the
    tenth."""
    known: dict[str, Any] = {}

    def key(name: str) -> list[Any]:
        parts = name.split(".")
        for part in parts:
            if part not in known:
                known[part] = dot_natural_key(part)[0]
        return [known[part] for part in parts]

    return sorted(names, key=key)
