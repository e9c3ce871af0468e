"""Builds transformers models without weights.

Private functions of transformers (>= 5.17, < 6) are used only here, in `hf_names`,
`dtype_plan`, `kv/cache` and `generation/`, and each use has a test.
"""

import contextlib
import copy
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ...io.checkpoint.index import Checkpoint
from ...io.errors import CheckpointError, UsageError
from ...io.weights.recipe import Recipe
from ..configs.hf_config import (
    check_layers,
    model_class_of,
    of_config,
    other_name,
    read_config,
    set_generation,
)
from ..configs.modelopt import as_compressed, modelopt_section, modules_left_out
from ..configs.quantizer import compressed_settings, dequantizer_of, prepare
from ..configs.trust import unused_code
from .hf_names import make_recipes
from .imagined import imagined_recipes
from .lossless import is_lossless, lossless_files
from .placeholder import absent_parameter
from .stored import check_readable, stored_dtype, unused_words


@dataclass(frozen=True)
class Skeleton:
    """A model whose streamed tensors are on meta, with the recipe of each."""

    model: PreTrainedModel
    recipes: Mapping[str, Recipe]
    """The recipes, by the names of parameters and persistent buffers in the model."""
    notes: tuple[str, ...] = ()
    """What is to be announced about the checkpoint."""


def build(
    checkpoint: Checkpoint, dtype: str, *, trust_remote_code: bool = False
) -> Skeleton:
    """Builds the model that `checkpoint`'s config.json describes, without the weights
    in `recipes`.

    Tensors that no checkpoint holds (rotary tables, masks, ALiBi slopes) are
    initialised as transformers does. `dtype` is the name of a floating dtype, or `auto`
    for the checkpoint's. Raises CheckpointError if tensors are missing, and UsageError
    for what is not supported.
    """
    folder = checkpoint.folder
    config = read_config(folder, trust_remote_code)
    check_layers(config, folder, num_tensors=len(checkpoint.entries))
    lossless = lossless_files(config, checkpoint)
    if lossless is not None:
        checkpoint = lossless.checkpoint
    section = modelopt_section(config, folder)
    if section is not None:
        config.quantization_config = section
        checkpoint = as_compressed(checkpoint)
    quantizer = dequantizer_of(config, folder)
    model_class = model_class_of(config, folder, trust_remote_code)
    model_dtype = _choose_dtype(config, checkpoint, dtype)
    _set_dtype(config, model_dtype)
    config.name_or_path = str(folder)
    with of_config(folder):
        model = _on_meta(model_class, config, model_dtype, trust_remote_code)
        if quantizer is not None:
            prepare(model, quantizer, model_dtype)
    recipes, unknown = make_recipes(model, checkpoint, model_dtype, quantizer)
    check_readable(recipes.values(), checkpoint)
    if lossless is not None:
        recipes = lossless.recipes(recipes)
    with of_config(folder):
        notes = _finish(model, recipes, unknown, checkpoint)
    set_generation(model, folder, trust_remote_code)
    model.train(False)
    others = (*other_name(folder, model_class), *unused_code(folder))
    return Skeleton(model, recipes, (*notes, *others))


def imagine(folder: Path, dtype: str, *, trust_remote_code: bool = False) -> Skeleton:
    """Builds the model that config.json in `folder` describes, as `build` would if its
    weights were there.

    Recipes are of one file that does not exist; its tensors have the sizes that a
    checkpoint of this config has, quantised as that says. Raises what `build` raises.
    """
    config = read_config(folder, trust_remote_code)
    check_layers(config, folder, num_tensors=10_000)  # of the largest models
    if is_lossless(config):
        raise UsageError(
            f"{folder} is quantised and has no weights: config.json alone does not say "
            "how many bytes they have; download the weights, too"
        )
    left_out = modules_left_out(config, folder)
    is_whole = "quantization_config" in vars(config)
    section = modelopt_section(config, folder)
    if section is not None:
        config.quantization_config = section
    compressed = compressed_settings(config, folder)
    quantizer = dequantizer_of(config, folder)
    model_class = model_class_of(config, folder, trust_remote_code)
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    nothing = Checkpoint(folder, {}, {})
    computed = stored if dtype == "auto" else _choose_dtype(config, nothing, dtype)
    _set_dtype(config, computed)
    config.name_or_path = str(folder)
    with of_config(folder):
        model = _on_meta(model_class, config, computed, trust_remote_code)
        if quantizer is not None:
            prepare(model, quantizer, computed)
        if compressed is not None and not is_whole and section is None:
            left_out += _beside_text(model)
        recipes = imagined_recipes(
            model, folder, stored, computed, quantizer, compressed, left_out
        )
        notes = _finish(model, recipes, {}, nothing)
    set_generation(model, folder, trust_remote_code)
    model.train(False)
    return Skeleton(model, recipes, (*notes, *other_name(folder, model_class)))


def _beside_text(model: PreTrainedModel) -> tuple[str, ...]:
    """The names of the modules that are not a part of the model's text decoder."""
    decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
    inside = {id(module) for module in decoder.modules()}
    return tuple(n for n, m in model.named_modules() if id(m) not in inside)


def _choose_dtype(config: Any, checkpoint: Checkpoint, asked: str) -> torch.dtype:
    if asked != "auto":
        found = getattr(torch, asked, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise UsageError(f"dtype {asked!r} is not a floating dtype of torch")
        return found
    if isinstance(config.dtype, torch.dtype):
        if not config.dtype.is_floating_point:
            raise CheckpointError(
                f"{checkpoint.folder}/config.json: dtype is {config.dtype}, which no "
                "model computes with: set dtype, such as float32"
            )
        return config.dtype
    return stored_dtype(checkpoint) or torch.float32


def _set_dtype(config: Any, dtype: torch.dtype) -> None:
    config.dtype = dtype
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            part.dtype = dtype


def _on_meta(
    model_class: type[PreTrainedModel],
    config: Any,
    dtype: torch.dtype,
    is_trusted: bool,
) -> PreTrainedModel:
    wanted: dict[str, Any] = {
        "dtype": dtype,
        "is_quantized": False,
        "_is_ds_init_called": False,
        "allow_all_kernels": is_trusted or None,
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


# Everything that the checkpoint does not hold.


def _finish(
    model: PreTrainedModel,
    recipes: Mapping[str, Recipe],
    unknown: Mapping[str, str],
    checkpoint: Checkpoint,
) -> tuple[str, ...]:
    """Ties weights and initialises buffers with transformers' own functions.

    Streamed tensors count as initialised. An untied tensor without a recipe is an
    error, except in the head, which not every task uses. `unknown` are tensors of the
    files that the model does not have: their names in the files, by the names that they
    would have in the model. Returns what is to be announced.
    """
    missing = set(model.state_dict()) - set(recipes)
    for name in recipes:
        model.get_parameter_or_buffer(name)._is_hf_initialized = True
    info = _loading_info(missing, unknown)
    model.mark_tied_weights_as_initialized(info)  # type: ignore[no-untyped-call]
    model._move_missing_keys_from_meta_to_device(
        info.missing_and_mismatched(), None, None, None
    )
    model._initialize_missing_keys(False)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    absent = sorted(info.missing_keys & _head_names(model))
    for name in absent:
        placeholder = absent_parameter(
            name, model.get_parameter(name), checkpoint.folder
        )
        owner, _, key = name.rpartition(".")
        store: dict[str, Any] = model.get_submodule(owner)._parameters
        store[key] = placeholder
    info.missing_keys -= set(absent)
    if info.missing_keys:
        names = sorted(info.missing_keys)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        why = "incomplete or of another architecture than config.json says"
        for stored in unknown.values():
            if stored.startswith(tuple(f"{name}_" for name in names[:3])):
                why = (
                    f"quantised, since {stored!r} is there, and its config.json does "
                    "not say how, in quantization_config; take an unquantised one"
                )
                break
        raise CheckpointError(
            f"{checkpoint.folder} lacks {', '.join(names[:3])}{more}, which "
            f"{type(model).__name__} needs: the checkpoint is {why}"
        )
    unused = unused_words([unknown[n] for n in info.unexpected_keys], recipes)
    headless = f"{checkpoint.folder} lacks {', '.join(absent)}: it can only embed"
    return tuple(filter(None, (unused, headless if absent else None)))


def _head_names(model: PreTrainedModel) -> set[str]:
    """The names of the parameters of the output embeddings."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None:
        return set()
    names = {id(module): name for name, module in model.named_modules()}
    return {f"{names[id(head)]}.{key}" for key, _ in head.named_parameters()}


def _loading_info(missing: set[str], unexpected: Iterable[str] = ()) -> Any:
    info_class: Any = vars(transformers.modeling_utils)["LoadStateDictInfo"]
    wanted = {
        "missing_keys": missing,
        "unexpected_keys": set(unexpected),
        "mismatched_keys": set(),
        "error_msgs": [],
        "conversion_errors": {},
        "skipped_pp_keys": set(),
    }
    known = inspect.signature(info_class).parameters
    return info_class(**{k: v for k, v in wanted.items() if k in known})
