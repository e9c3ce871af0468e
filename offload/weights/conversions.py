"""Makes recipes of transformers' conversions of weights.

If views suffice, bytes are copied, or decoded, to their places; else transformers' own
function converts tensors.
"""

import contextlib
import re
import weakref
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    SplitModulelist,
    Transpose,
)

from ...io.checkpoint.header import TensorEntry
from ...io.errors import CheckpointError, ClosedError
from ...io.weights.recipe import Recipe, TensorSlice, View, computed
from .dtype_plan import DtypePlan

_OF_SHAPE = (Chunk, Concatenate, MergeModulelist, SplitModulelist, Transpose)
"""Operations whose views depend on the tensor's shape and the config alone."""


@dataclass
class Target:
    """A group of the model's tensors that is made from a group of stored ones."""

    converter: Any
    sources: dict[str, list[TensorEntry]]
    """The stored tensors, by the converter's source pattern, in transformers' order."""


def check_shape(recipe: Recipe, meta: torch.Tensor, entry: TensorEntry) -> None:
    if recipe.shape != tuple(meta.shape):
        raise CheckpointError(
            f"{entry.path}, tensor {entry.name!r} has shape {list(entry.shape)}, but "
            f"the model's {recipe.name!r} has {list(meta.shape)}: config.json is of "
            "another model"
        )


class _Meta(torch.Tensor):
    """A meta tensor that claims to be contiguous.

    So transformers' operations return views of it, whose strides tell where every
    element goes.
    """

    def contiguous(self, *args: Any, **kwargs: Any) -> "_Meta":
        return self


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta").as_subclass(_Meta)


def converted(
    places: "Places",
    name: str,
    target: Target,
    state: Mapping[str, torch.Tensor],
    dtypes: DtypePlan,
) -> list[Recipe]:
    """The recipes of all tensors of the model that `target`'s converter makes."""
    for attempt in (_merged, _cut):
        # If an operation is not a view, these ways fail with various errors. The last
        # way always works.
        with contextlib.suppress(Exception):
            pieces = attempt(places, name, target, state)
            return [
                Recipe(
                    made,
                    tuple(state[made].shape),
                    dtypes.of(made, state[made]),
                    tuple(parts),
                )
                for made, parts in pieces.items()
            ]
    return list(_by_function(places.model, name, target, state, dtypes))


def _run(
    operations: list[Any],
    tensors: dict[str, Any],
    converter: Any,
    model: PreTrainedModel,
    name: str,
) -> dict[str, Any]:
    for operation in operations:
        tensors = operation.convert(
            tensors,
            source_patterns=converter.source_patterns,
            target_patterns=converter.target_patterns,
            full_layer_name=name,
            model=model,
            config=model.config,
            missing_keys=None,
        )
    return tensors


def _merged(
    places: "Places", name: str, target: Target, state: Mapping[str, torch.Tensor]
) -> dict[str, list[TensorSlice]]:
    """Slices of many stored tensors that fill one tensor."""
    pieces = []
    for entry, view in places.of(name, target, state[name]):
        pieces.append(TensorSlice(entry, View.whole(entry.shape), view))
        _check_piece(pieces[-1])
    return {name: pieces}


class Places:
    """Knows which parts of the tensors of `model` (on meta) stored tensors fill."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._known: dict[Hashable, list[View]] = {}
        self.num_traces = 0
        """How often operations were run to find out."""

    def of(
        self, name: str, target: Target, meta: torch.Tensor
    ) -> list[tuple[TensorEntry, View]]:
        """The stored tensors of `target`, and the part of `meta`, the tensor `name` on
        meta, that each fills.

        The reverse operations, run on a meta parameter, return the view of it that each
        stored tensor fills; the same ones for equal tensors of all blocks. Raises
        ValueError, or what transformers raises, if they are no views, or do not fill
        it.
        """
        entries = [entry for group in target.sources.values() for entry in group]
        kind = (
            id(target.converter),
            tuple(meta.shape),
            tuple((pattern, len(group)) for pattern, group in target.sources.items()),
        )
        views = self._known.get(kind)
        if views is None:
            views = self._traced(name, target, meta)
            if all(type(o) in _OF_SHAPE for o in target.converter.operations):
                self._known[kind] = views
        return list(zip(entries, views, strict=True))

    def _traced(self, name: str, target: Target, meta: torch.Tensor) -> list[View]:
        self.num_traces += 1
        whole = _meta(tuple(meta.shape), meta.dtype)
        reverse = target.converter.reverse_transform()
        made = _run(
            reverse.operations,
            {reverse.source_patterns[0]: [whole]},
            reverse,
            self.model,
            name,
        )
        views: list[View] = []
        for pattern, entries in target.sources.items():
            found = [
                (int(match[1]) if match.groups() else 0, view)
                for key, view in made.items()
                if (match := re.fullmatch(_numbered(pattern), key.replace("\\.", ".")))
            ]
            found.sort(key=lambda item: item[0])
            for _, (_, view) in zip(entries, found, strict=True):
                view = view[0] if isinstance(view, list) else view
                views.append(_view_of(view, whole))
        if sum(view.numel for view in views) != meta.numel():
            raise ValueError(f"{name} is not filled")
        return views


def _numbered(pattern: str) -> str:
    """A regex for the full names that match a pattern of transformers, which may write
    a dot as "." or "\\."."""
    plain_dots = pattern.replace("\\.", ".")
    return re.escape(plain_dots).replace(r"\*", r"(\d+)")


def _cut(
    places: "Places", name: str, target: Target, state: Mapping[str, torch.Tensor]
) -> dict[str, list[TensorSlice]]:
    """Slices of one stored tensor that fill many tensors.

    The operations, run on a meta tensor, return views of the stored tensor.
    """
    ((pattern, (entry,)),) = target.sources.items()
    whole = _meta(entry.shape, entry.dtype)
    converter = target.converter
    views = _run(
        converter.operations, {pattern: [whole]}, converter, places.model, name
    )
    pieces = {}
    for key, view in _full_names(name, views).items():
        view = view[0] if isinstance(view, list) else view
        shape = tuple(state[key].shape)
        pieces[key] = [TensorSlice(entry, _view_of(view, whole), View.whole(shape))]
        _check_piece(pieces[key][0])
    return pieces


def _by_function(
    model: PreTrainedModel,
    name: str,
    target: Target,
    state: Mapping[str, torch.Tensor],
    dtypes: DtypePlan,
) -> Iterator[Recipe]:
    """Recipes that call transformers' own conversion at each load.

    It gets the stored tensors, cast to their dtype first, as in transformers.
    """
    entries = tuple(e for group in target.sources.values() for e in group)
    first = dtypes.of(name, state[name])
    metas = {
        pattern: [_plain_meta(e, first) for e in group]
        for pattern, group in target.sources.items()
    }
    converter = target.converter
    made = _full_names(name, _run(converter.operations, metas, converter, model, name))
    # The converting threads must not keep the model alive.
    weak = weakref.ref(model)
    for key in made:
        if key not in state:
            raise CheckpointError(f"{name}: transformers converts it to unknown {key}")

        def compute(stored: Mapping[str, torch.Tensor], key: str = key) -> torch.Tensor:
            tensors = {
                pattern: [stored[e.name].to(first) for e in group]
                for pattern, group in target.sources.items()
            }
            there = weak()
            if there is None:
                raise ClosedError(f"the model of {name!r} is gone")
            results = _run(converter.operations, tensors, converter, there, name)
            result = _full_names(name, results)[key]
            tensor = result[0] if isinstance(result, list) else result
            assert isinstance(tensor, torch.Tensor)
            return tensor

        shape = tuple(state[key].shape)
        yield computed(key, shape, dtypes.of(key, state[key]), compute, entries)


def _plain_meta(entry: TensorEntry, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(entry.shape, dtype=dtype, device="meta")


def _full_names(name: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Completes the names in `tensors`, which operations return by pattern, with the
    prefix and suffix of `name`."""
    full = name.replace("*.", "0.")
    for key in tensors:
        if key in full:
            prefix, _, suffix = full.partition(key)
            return {prefix + k + suffix: v for k, v in tensors.items()}
    return dict(tensors)


def _view_of(view: torch.Tensor, whole: torch.Tensor) -> View:
    if view.untyped_storage()._cdata != whole.untyped_storage()._cdata:
        raise ValueError("no view")
    return View.of(view)


def _check_piece(piece: TensorSlice) -> None:
    if piece.source.shape != piece.target.shape:
        raise ValueError(f"{piece.entry.name}: {piece.source} does not fill its place")
