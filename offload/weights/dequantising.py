"""Makes recipes of the weights of a quantised checkpoint."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from ...io.checkpoint.header import TensorEntry
from ...io.errors import CheckpointError
from ...io.weights.recipe import Recipe, View, plain
from .conversions import Places, Target, check_shape, converted
from .dtype_plan import DtypePlan
from .formats import Format, format_of, is_coded

Parts = dict[str, TensorEntry]
"""The stored tensors of one weight, by what they are: `weight`, `weight_scale_inv`."""


_EXPERT = re.compile(r"(.*\.)(\d+)(\.\D*)")
"""The name of a tensor of one of several modules, and its number among them."""
_INCOMPLETE = (
    "which the files lack: the checkpoint is incomplete; download or copy it again"
)


def is_dequantised(target: Target) -> bool:
    """Whether transformers' first operation on the stored tensors dequantises them.

    It is, for all weights of a quantised checkpoint; some may be stored as they are.
    """
    operations = target.converter.operations
    return bool(operations) and hasattr(operations[0], "hf_quantizer")


class Dequantising:
    """Knows how the weights of a model are made of quantised tensors."""

    def __init__(
        self,
        places: Places,
        state: Mapping[str, torch.Tensor],
        dtypes: DtypePlan,
    ) -> None:
        self._found = places
        self._state = state
        self._dtypes = dtypes
        self._plain: list[Any] | None = None

    def recipes_of(self, name: str, target: Target) -> list[Recipe]:
        """The recipes of what `target` makes, the tensor `name` among them.

        Raises CheckpointError for stored tensors that are missing or do not go
        together, and for what cannot be streamed.
        """
        operation, *others = target.converter.operations
        kind = format_of(operation, is_merged=bool(others))
        weights = _weights(target)
        numbers = {
            pattern: [_numbers(kind, parts) for parts in found.values()]
            for pattern, found in weights.items()
        }
        found = [parts for group in weights.values() for parts in group.values()]
        is_quantised = any(kind.is_quantised(parts) for parts in found)
        for parts in found:
            entry = _numbers(kind, parts)
            if not kind.is_quantised(parts) and (is_quantised or is_coded(entry.dtype)):
                raise CheckpointError(
                    f"{entry.path}: {entry.name!r} is kept as {entry.dtype}, and the "
                    f"files have no scales for it, which {name!r} needs: the "
                    "checkpoint is incomplete; download or copy it again"
                )
        if not is_quantised:
            return self._unquantised(name, numbers, is_converted=bool(others))
        meta = self._state[name]
        views = [View.whole(tuple(meta.shape))]
        if others:
            views = self._places(name, numbers)
        pairs = zip(found, views, strict=True)
        slices = tuple(s for parts, view in pairs for s in kind.slices(parts, view))
        dtype = self._dtypes.of(name, meta)
        return [Recipe(name, tuple(meta.shape), dtype, slices)]

    def _unquantised(
        self,
        name: str,
        numbers: dict[str, list[TensorEntry]],
        *,
        is_converted: bool,
    ) -> list[Recipe]:
        if is_converted:
            target = Target(self._converter(name, numbers), numbers)
            return converted(self._found, name, target, self._state, self._dtypes)
        ((entry,),) = numbers.values()
        dtype = self._dtypes.of(name, self._state[name])
        recipe = plain(entry, name=name, dtype=dtype)
        check_shape(recipe, self._state[name], entry)
        return [recipe]

    def _places(
        self, name: str, numbers: Mapping[str, list[TensorEntry]]
    ) -> list[View]:
        """The part of the tensor `name` that each weight fills."""
        target = Target(self._converter(name, numbers), dict(numbers))
        try:
            places = self._found.of(name, target, self._state[name])
        except Exception as error:
            patterns = target.converter.source_patterns
            why = _gap(numbers, patterns, len(self._state[name]))
            count = sum(map(len, numbers.values()))
            why = why or (
                f"from {count} quantised tensors, as transformers would: take an "
                "unquantised release of the model"
            )
            raise CheckpointError(f"{name} cannot be put together {why}") from error
        return [view for _, view in places]

    def _converter(self, name: str, numbers: Mapping[str, list[TensorEntry]]) -> Any:
        """The converter that the model has for unquantised weights."""
        if self._plain is None:
            mapping = get_model_conversion_mapping(self._found.model)
            self._plain = [m for m in mapping if isinstance(m, WeightConverter)]
        for converter in self._plain:
            if numbers.keys() <= set(converter.source_patterns):
                return converter
        raise CheckpointError(
            f"{name}: transformers {list(numbers)} has no conversion without scales"
        )


def _weights(target: Target) -> dict[str, dict[str, Parts]]:
    """The stored tensors of `target`, by the source pattern of the unquantised weight,
    and by the module that holds them: both in transformers' order."""
    found: dict[str, dict[str, Parts]] = {}
    for pattern, entries in target.sources.items():
        prefix, dot, part = pattern.rpartition(".")
        weights = found.setdefault(f"{prefix}{dot}weight", defaultdict(dict))
        for entry in entries:
            parts = weights[entry.name.rpartition(".")[0]]
            if (other := parts.setdefault(part, entry)) is not entry:
                raise _both(other, entry)
    order = [p.rpartition(".")[0] for p in target.converter.source_patterns]
    return dict(
        sorted(found.items(), key=lambda i: order.index(i[0].rpartition(".")[0]))
    )


def _both(one: TensorEntry, other: TensorEntry) -> CheckpointError:
    return CheckpointError(
        f"{one.path}: {one.name!r} and {other.name!r} are both there, for one weight: "
        "download or copy it again"
    )


def _numbers(kind: Format, parts: Parts) -> TensorEntry:
    """The stored tensor of the weight itself, among its `parts`."""
    found = [parts[part] for part in kind.numbers if part in parts]
    if len(found) > 1:
        raise _both(*found)
    if found:
        return found[0]
    entry = next(iter(parts.values()))
    raise CheckpointError(
        f"{entry.path}: {entry.name!r} is there, but not the "
        f"{' or '.join(kind.numbers)} beside it: the checkpoint is incomplete; "
        "download or copy it again"
    )


def _gap(
    numbers: Mapping[str, list[TensorEntry]], patterns: Sequence[str], count: int
) -> str | None:
    """The tensors of experts that are missing, or are too many, where `count` of them
    are to be there for each of transformers' `patterns`: how a sentence goes on."""
    for pattern in patterns:
        found = {_place_in_list(entry): entry for entry in numbers.get(pattern, [])}
        if not found:
            return f"without {pattern}, {_INCOMPLETE}"
        entry = next(iter(found.values()))
        if "*" not in pattern or None in found:
            continue
        for i in range(count):
            if i not in found:
                name = _EXPERT.sub(rf"\g<1>{i}\g<3>", entry.name)
                return f"without {name!r}, {_INCOMPLETE}"
        for expert in found.keys() - set(range(count)):
            return (
                f"since {found[expert].name!r} is there, too, and the model has "
                f"{count} experts: config.json is of another model"
            )
    return None


def _place_in_list(entry: TensorEntry) -> int | None:
    """The last number among the parts of a name."""
    found = _EXPERT.fullmatch(entry.name)
    return int(found[2]) if found else None
