"""A checkpoint and its original, whose weights have the same names and shapes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...io.errors import UsageError
from ...io.weights.recipe import Recipe
from ..configs.opening import open_model
from ..policy import Policy
from ..rows.text import load_tokenizer
from ..verify import assembled
from ..weights import hf
from .weight_errors import (
    UnitError,
    WeightError,
    added,
    unit_of,
    weight_error,
    worst_of,
)

_NOT_OF_THE_MODEL = {
    "_name_or_path",
    "architectures",
    "compression_config",
    "dtype",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Keys of config.json that may differ without another result."""


@dataclass(frozen=True)
class Pair:
    """Two checkpoints of one architecture."""

    model: hf.Skeleton
    original: hf.Skeleton
    dtype: str
    """The dtype in which weights are compared: the policy's, else the original's."""
    notes: tuple[str, ...]
    """What their config.json say differently, and what is to be announced of each."""

    @property
    def units(self) -> dict[str, list[str]]:
        """The tensors of each unit, in the order of the model."""
        found: dict[str, list[str]] = {}
        for name in _in_order(self.original):
            found.setdefault(unit_of(name), []).append(name)
        return found

    def errors(self) -> Iterator[UnitError]:
        """The difference of each unit, in the order of the model. One tensor of each
        checkpoint is in memory at a time, whole."""
        for unit, names in self.units.items():
            yield self._unit(unit, names)

    def _unit(self, unit: str, names: list[str]) -> UnitError:
        found: list[WeightError] = []
        nbytes = original_bytes = 0
        for name in names:
            one, other = _recipe(self.model, name), _recipe(self.original, name)
            assert one is not None, "the names were compared"
            assert other is not None, "the names were compared"
            nbytes += one.stored_bytes
            original_bytes += other.stored_bytes
            found.append(weight_error(name, assembled(one), assembled(other)))
        num_identical = sum(error.is_identical for error in found)
        return UnitError(
            added(unit, found),
            worst_of(found),
            len(found),
            num_identical,
            nbytes,
            original_bytes,
        )


def open_pair(model: Path, original: Path, policy: Policy) -> Pair:
    """Opens the checkpoints in two folders, without their weights.

    Raises UsageError if they are not of one architecture, and what `penstock.load`
    raises for a checkpoint that is missing or wrong.
    """
    trusted = policy.trust_remote_code
    other = hf.build(open_model(original), policy.dtype, trust_remote_code=trusted)
    dtype = str(other.model.config.dtype).removeprefix("torch.")
    one = hf.build(open_model(model), dtype, trust_remote_code=trusted)
    _check(model, one, original, other)
    notes = [
        *(f"{model}: {note}" for note in one.notes),
        *(f"{original}: {note}" for note in other.notes),
        *_differing(one.model.config.to_dict(), other.model.config.to_dict()),
    ]
    return Pair(one, other, dtype, tuple(notes))


def check_tokenizers(model: Path, original: Path, *, trust_remote_code: bool) -> None:
    """Raises UsageError if one of them has no tokenizer, or if their vocabularies
    differ."""
    one, other = (
        load_tokenizer(folder, trust_remote_code=trust_remote_code).get_vocab()
        for folder in (model, original)
    )
    if one == other:
        return
    token = min(token for token in {*one, *other} if one.get(token) != other.get(token))
    raise UsageError(
        f"the tokenizers differ ({token!r} is token {one.get(token, 'none')} in "
        f"{model} and {other.get(token, 'none')} in {original}), so their "
        f"perplexities cannot be compared: copy the tokenizer's files of {original} to "
        f"{model}, or leave the rows out to compare weights only"
    )


def _check(model: Path, one: hf.Skeleton, original: Path, other: hf.Skeleton) -> None:
    fix = f"take as ORIGINAL the checkpoint that {model} was made from"
    kinds = [type(skeleton.model).__name__ for skeleton in (one, other)]
    if kinds[0] != kinds[1]:
        raise UsageError(
            f"{model} is a {kinds[0]} and {original} is a {kinds[1]}, whose weights "
            f"cannot be compared: {fix}"
        )
    for name in dict.fromkeys([*_in_order(other), *_in_order(one)]):
        recipes = _recipe(one, name), _recipe(other, name)
        if None in recipes:
            has, lacks = (model, original) if recipes[0] else (original, model)
            raise UsageError(f"{has} has the weight {name!r}, {lacks} has not: {fix}")
        shapes = [list(recipe.shape) for recipe in recipes if recipe is not None]
        if shapes[0] != shapes[1]:
            raise UsageError(
                f"{name!r} is {shapes[0]} in {model} and {shapes[1]} in {original}, "
                f"so they cannot be compared: {fix}"
            )


def _recipe(skeleton: hf.Skeleton, name: str) -> Recipe | None:
    """How the tensor `name` is made, or the tensor that it is tied to; None if there is
    no such tensor."""
    model: Any = skeleton.model
    tied: Mapping[str, str] = model.all_tied_weights_keys
    found = skeleton.recipes.get(name)
    return skeleton.recipes.get(tied.get(name, "")) if found is None else found


def _in_order(skeleton: hf.Skeleton) -> list[str]:
    """The names of the recipes in the order of the model."""
    order: dict[str, Any] = skeleton.model.state_dict()
    found = [name for name in order if name in skeleton.recipes]
    return [*found, *(name for name in skeleton.recipes if name not in order)]


def _differing(
    one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    """What two configs say differently, in a sentence each."""
    for key in sorted({*map(str, one), *map(str, other)} - _NOT_OF_THE_MODEL):
        mine, its = one.get(key), other.get(key)
        if isinstance(mine, dict) and isinstance(its, dict):
            yield from _differing(mine, its, f"{prefix}{key}.")
        elif mine != its:
            yield (
                f"config.json differs from the original's: {prefix}{key} is "
                f"{mine!r:.60}, not {its!r:.60}"
            )
