"""The one place that knows transformers from the inside: building a model without
weights, and which stored tensor lands where in it.

Uses private calls of transformers (>= 5.17, < 6), each of them under a contract test.
"""

import contextlib
import copy
import inspect
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from ..io.checkpoint import Checkpoint
from ..io.errors import CheckpointError, UsageError
from ..io.header import TensorEntry
from ..io.recipe import Piece, Recipe, View, plain


@dataclass(frozen=True)
class Skeleton:
    """A model whose streamed tensors are on meta, and how each is made."""

    model: PreTrainedModel
    recipes: Mapping[str, Recipe]
    """By the name of the parameter or persistent buffer in the model."""


def build(checkpoint: Checkpoint, dtype: str) -> Skeleton:
    """The model that `checkpoint`'s config.json describes, ready but for the weights
    in `recipes`; everything that no checkpoint holds (rotary tables, masks, ALiBi
    slopes) is initialised as transformers does it.

    Raises CheckpointError for missing tensors, UsageError for what is unsupported.
    """
    config = _read_config(checkpoint.folder)
    model_class = _model_class(config, checkpoint.folder)
    model_dtype = _choose_dtype(config, checkpoint, dtype)
    _set_dtype(config, model_dtype)
    model = _on_meta(model_class, config, model_dtype)
    recipes = _recipes(model, checkpoint, model_dtype)
    _finish(model, recipes, checkpoint)
    if model.can_generate() and (checkpoint.folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    model.eval()
    model.requires_grad_(False)
    return Skeleton(model, recipes)


def _read_config(folder: Path) -> Any:
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} has no config.json: no Hugging Face checkpoint")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"{folder}/config.json: {error}") from error


def _model_class(config: Any, folder: Path) -> type[PreTrainedModel]:
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(
            f"{folder} is quantised ({config.quantization_config}); this version "
            "streams unquantised checkpoints only"
        )
    names = config.architectures or []
    for name in names:
        found = getattr(transformers, name, None)
        if inspect.isclass(found) and issubclass(found, PreTrainedModel):
            return found
    raise UsageError(
        f"{folder}/config.json names the architectures {names}, none of which "
        f"transformers {transformers.__version__} has; models with code of their own "
        "can be built by you and given to penstock.wrap"
    )


def _choose_dtype(config: Any, checkpoint: Checkpoint, asked: str) -> torch.dtype:
    if asked != "auto":
        found = getattr(torch, asked, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise UsageError(f"dtype {asked!r} is no floating dtype of torch")
        return found
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    floating = (e.dtype for e in checkpoint.entries.values() if e.dtype.is_floating_point)
    return next(floating, torch.float32)


def _set_dtype(config: Any, dtype: torch.dtype) -> None:
    config.dtype = dtype
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            part.dtype = dtype


def _on_meta(
    model_class: type[PreTrainedModel], config: Any, dtype: torch.dtype
) -> PreTrainedModel:
    wanted = {
        "dtype": dtype,
        "is_quantized": False,
        "_is_ds_init_called": False,
        "allow_all_kernels": None,
    }
    known = inspect.signature(model_class.get_init_context).parameters
    contexts = model_class.get_init_context(
        **{key: value for key, value in wanted.items() if key in known}
    )
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        model = model_class(copy.deepcopy(config))
        patch = getattr(transformers.modeling_utils, "patch_output_recorders", None)
        if patch is not None:
            patch(model)
    return model


# Names: which stored tensors make which tensor of the model.


@dataclass
class _Target:
    """A group of tensors of the model made from a group of stored ones."""

    converter: Any
    sources: dict[str, list[TensorEntry]]
    """Stored tensors by the converter's source pattern, in transformers' order."""


def _recipes(
    model: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype
) -> dict[str, Recipe]:
    state: dict[str, torch.Tensor] = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    dtypes = _Dtypes(model, dtype)
    recipes: dict[str, Recipe] = {}
    targets: dict[str, _Target] = {}
    for stored in sorted(checkpoint.entries, key=dot_natural_key):
        entry = checkpoint.entries[stored]
        prefix = model.base_model_prefix
        name, pattern = rename_source_key(stored, renamings, converters, prefix, state)
        if name not in state and stored in state:
            name, pattern = rename_source_key(stored, [], [], prefix, state)
        if name not in state:
            continue  # transformers ignores what the model has no place for
        if pattern is None:
            recipes[name] = plain(entry, name=name, dtype=dtypes.of(name, state[name]))
            _check_shape(recipes[name], state[name], entry)
        else:
            target = targets.setdefault(
                name, _Target(by_pattern[pattern], defaultdict(list))
            )
            target.sources[pattern].append(entry)
    for name, target in targets.items():
        for recipe in _converted(model, name, target, state, dtypes):
            recipes[recipe.name] = recipe
    return recipes


class _Dtypes:
    """The dtype each tensor ends up with: the model's, the plan's, or its own."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._plan = model._get_dtype_plan(dtype)
        self._search: Any = None
        if self._plan:
            self._search, self._groups, _ = build_glob_alternation(list(self._plan))

    def of(self, name: str, meta: torch.Tensor) -> torch.dtype:
        match = self._search.search(name) if self._search is not None else None
        if match is not None:
            planned = self._plan[self._groups[match.lastgroup]]
            assert isinstance(planned, torch.dtype)
            return planned
        return meta.dtype


def _check_shape(recipe: Recipe, meta: torch.Tensor, entry: TensorEntry) -> None:
    if recipe.shape != tuple(meta.shape):
        raise CheckpointError(
            f"{entry.path}, tensor {entry.name!r} has shape {list(entry.shape)}, but "
            f"the model's {recipe.name!r} has {list(meta.shape)}: config.json is of "
            "another model"
        )


# Conversions: where views suffice, bytes land in place; else transformers converts.


class _Meta(torch.Tensor):
    """A meta tensor that calls itself contiguous, so that transformers' operations
    give views of it and their strides tell where every element goes."""

    def contiguous(self, *args: Any, **kwargs: Any) -> "_Meta":
        return self


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta").as_subclass(_Meta)


def _converted(
    model: PreTrainedModel,
    name: str,
    target: _Target,
    state: Mapping[str, torch.Tensor],
    dtypes: _Dtypes,
) -> Iterator[Recipe]:
    """The recipes of all tensors of the model that `target`'s converter makes."""
    for attempt in (_merged, _cut):
        with contextlib.suppress(Exception):  # no views: the next way is general
            pieces = attempt(model, name, target, state)
            for made, parts in pieces.items():
                shape = tuple(state[made].shape)
                yield Recipe(made, shape, dtypes.of(made, state[made]), tuple(parts))
            return
    yield from _by_function(model, name, target, state, dtypes)


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
    model: PreTrainedModel,
    name: str,
    target: _Target,
    state: Mapping[str, torch.Tensor],
) -> dict[str, list[Piece]]:
    """Many stored tensors into one: the reverse operations, run on a meta parameter,
    give the view of it that each stored tensor fills."""
    meta = state[name]
    whole = _meta(tuple(meta.shape), meta.dtype)
    reverse = target.converter.reverse_transform()
    views = _run(
        reverse.operations, {reverse.source_patterns[0]: [whole]}, reverse, model, name
    )
    pieces: list[Piece] = []
    for pattern, entries in target.sources.items():
        found = [
            (int(match[1]) if match.groups() else 0, view)
            for key, view in views.items()
            if (match := re.fullmatch(re.escape(pattern).replace(r"\*", r"(\d+)"), key))
        ]
        found.sort(key=lambda item: item[0])
        for entry, (_, view) in zip(entries, found, strict=True):
            view = view[0] if isinstance(view, list) else view
            pieces.append(Piece(entry, View.whole(entry.shape), _view_of(view, whole)))
            _check_piece(pieces[-1])
    if sum(piece.target.numel for piece in pieces) != meta.numel():
        raise ValueError(f"{name} is not filled")
    return {name: pieces}


def _cut(
    model: PreTrainedModel,
    name: str,
    target: _Target,
    state: Mapping[str, torch.Tensor],
) -> dict[str, list[Piece]]:
    """One stored tensor into many: the operations give views of the stored one."""
    ((pattern, (entry,)),) = target.sources.items()
    whole = _meta(entry.shape, entry.dtype)
    converter = target.converter
    views = _run(converter.operations, {pattern: [whole]}, converter, model, name)
    pieces = {}
    for key, view in _full_names(name, views).items():
        view = view[0] if isinstance(view, list) else view
        shape = tuple(state[key].shape)
        pieces[key] = [Piece(entry, _view_of(view, whole), View.whole(shape))]
        _check_piece(pieces[key][0])
    return pieces


def _by_function(
    model: PreTrainedModel,
    name: str,
    target: _Target,
    state: Mapping[str, torch.Tensor],
    dtypes: _Dtypes,
) -> Iterator[Recipe]:
    """The general way: transformers' own conversion, run at each load on the tensors
    as they are stored (cast first, as transformers does)."""
    entries = tuple(e for group in target.sources.values() for e in group)
    first = dtypes.of(name, state[name])
    metas = {
        pattern: [_plain_meta(e, first) for e in group]
        for pattern, group in target.sources.items()
    }
    converter = target.converter
    made = _full_names(name, _run(converter.operations, metas, converter, model, name))
    for key in made:
        if key not in state:
            raise CheckpointError(f"{name}: transformers converts it to unknown {key}")

        def convert(
            stored: Mapping[str, torch.Tensor], key: str = key
        ) -> torch.Tensor:
            tensors = {
                pattern: [stored[e.name].to(first) for e in group]
                for pattern, group in target.sources.items()
            }
            results = _run(converter.operations, tensors, converter, model, name)
            result = _full_names(name, results)[key]
            tensor = result[0] if isinstance(result, list) else result
            assert isinstance(tensor, torch.Tensor)
            return tensor

        yield Recipe(
            key,
            tuple(state[key].shape),
            dtypes.of(key, state[key]),
            convert=convert,
            entries=entries,
        )


def _plain_meta(entry: TensorEntry, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(entry.shape, dtype=dtype, device="meta")


def _full_names(name: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What operations return is named by pattern: `name` gives prefix and suffix."""
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


def _check_piece(piece: Piece) -> None:
    if piece.source.shape != piece.target.shape:
        raise ValueError(f"{piece.entry.name}: {piece.source} does not fill its place")


# Everything that the checkpoint does not hold.


def _finish(
    model: PreTrainedModel, recipes: Mapping[str, Recipe], checkpoint: Checkpoint
) -> None:
    """Ties weights and initialises buffers by transformers' own steps. The streamed
    tensors count as initialised; an untied one without a recipe is an error."""
    missing = set(model.state_dict()) - set(recipes)
    for name in recipes:
        model.get_parameter_or_buffer(name)._is_hf_initialized = True
    info = _loading_info(missing)
    model.mark_tied_weights_as_initialized(info)
    model._move_missing_keys_from_meta_to_device(
        info.missing_and_mismatched(), None, None, None
    )
    model._initialize_missing_keys(False)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    if info.missing_keys:
        names = sorted(info.missing_keys)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise CheckpointError(
            f"{checkpoint.folder} lacks {', '.join(names[:3])}{more}, which "
            f"{type(model).__name__} needs: the checkpoint is incomplete or of another "
            "architecture than config.json says"
        )


def _loading_info(missing: set[str]) -> Any:
    info_class = transformers.modeling_utils.LoadStateDictInfo
    wanted = {
        "missing_keys": missing,
        "unexpected_keys": set(),
        "mismatched_keys": set(),
        "error_msgs": [],
        "conversion_errors": {},
        "skipped_pp_keys": set(),
    }
    known = inspect.signature(info_class).parameters
    return info_class(**{k: v for k, v in wanted.items() if k in known})


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """Every name under which each distinct parameter is found, by its first name."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        key = first.setdefault(id(parameter), name)
        names.setdefault(key, []).append(name)
    return names
