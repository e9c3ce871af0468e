"""Knows transformers from the inside: building a model without weights.

Private calls of transformers (>= 5.17, < 6) stand here, in `hf_names`, `kv/cache` and
`tasks/decoding` alone, each of them under a test.
"""

import contextlib
import copy
import functools
import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from ...io.checkpoint import Checkpoint
from ...io.errors import CheckpointError, UsageError
from ...io.front_door import about
from ...io.recipe import Recipe
from ...io.whole import read_json_object
from . import trust
from .hf_names import make_recipes
from .poison import absent_parameter
from .stored import check_readable, stored_dtype, unused_words

_LAYERS = re.compile(r"(^|_)(n|num|encoder|decoder|hidden)_?(layers?|blocks?)$|^depth$")
"""Keys of a config that say how many blocks there are."""
_FEW_LAYERS = 256
"""May be more than a checkpoint has tensors: some models run a block repeatedly."""


@dataclass(frozen=True)
class Skeleton:
    """A model whose streamed tensors are on meta, and how each is made."""

    model: PreTrainedModel
    recipes: Mapping[str, Recipe]
    """By the name of the parameter or persistent buffer in the model."""
    notes: tuple[str, ...] = ()
    """What is to be announced of the checkpoint."""


def build(
    checkpoint: Checkpoint, dtype: str, *, trust_remote_code: bool = False
) -> Skeleton:
    """The model that `checkpoint`'s config.json describes, ready but for the weights
    in `recipes`; everything that no checkpoint holds (rotary tables, masks, ALiBi
    slopes) is initialised as transformers does it.

    Raises CheckpointError for missing tensors, UsageError for what is unsupported.
    """
    folder = checkpoint.folder
    config = _read_config(folder, trust_remote_code)
    _check_layers(config, folder, num_tensors=len(checkpoint.entries))
    model_class = _model_class(config, folder, trust_remote_code)
    model_dtype = _choose_dtype(config, checkpoint, dtype)
    _set_dtype(config, model_dtype)
    config.name_or_path = str(folder)
    with _of_config(folder):
        model = _on_meta(model_class, config, model_dtype, trust_remote_code)
    recipes, unknown = make_recipes(model, checkpoint, model_dtype)
    check_readable(recipes.values(), checkpoint)
    with _of_config(folder):
        notes = _finish(model, recipes, unknown, checkpoint)
    set_generation(model, folder, trust_remote_code)
    model.train(False)
    return Skeleton(model, recipes, notes)


def state_on_meta(
    folder: Path, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> dict[str, torch.Tensor]:
    """Names, shapes and dtypes of what the model of config.json keeps, tied tensors
    once. Raises as `build` does."""
    config = _read_config(folder, trust_remote_code)
    _check_layers(config, folder, num_tensors=10_000)  # of the largest models
    model_class = _model_class(config, folder, trust_remote_code)
    _set_dtype(config, dtype)
    with _of_config(folder):
        model = _on_meta(model_class, config, dtype, trust_remote_code)
    tied = set(model.all_tied_weights_keys)
    state: dict[str, torch.Tensor] = model.state_dict()
    return {name: tensor for name, tensor in state.items() if name not in tied}


def _of_config(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Around what is done with the values of config.json: those alone make it fail."""
    fix = "no model can be made of what it says"
    return about(f"{folder}/config.json", CheckpointError, fix=fix, every=True)


def _read_config(folder: Path, is_trusted: bool) -> Any:
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(
            f"{folder} has no config.json: no Hugging Face checkpoint"
        )
    trust.check_files(folder)
    values = trust.read_config(folder, is_trusted=is_trusted)
    code, kind = trust.own_code(values), values.get("model_type")
    is_known = isinstance(kind, str) and kind in transformers.CONFIG_MAPPING
    if code is not None and not (is_trusted or is_known):
        raise trust.refuse_code(path, code)
    with about(str(path), CheckpointError):
        config = AutoConfig.from_pretrained(folder, **trust.loading(is_trusted))
    if not is_trusted:
        trust.without_code(config)
    names = config.architectures or []
    if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
        raise CheckpointError(
            f"{path}: architectures must be a list of names, not {names!r:.100}"
        )
    return config


def _check_layers(config: Any, folder: Path, *, num_tensors: int) -> None:
    """Raises CheckpointError where a config promises more blocks than there are tensors
    in the files: before a billion of them are made."""
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    for part in parts:
        for key, value in vars(part).items() if part is not None else ():
            if not isinstance(value, int) or not _LAYERS.search(key):
                continue
            if value > max(num_tensors, _FEW_LAYERS):
                raise CheckpointError(
                    f"{folder}/config.json: {key} is {value:,}, but the checkpoint has "
                    f"{num_tensors:,} tensors: it is of another model"
                )


def _model_class(config: Any, folder: Path, is_trusted: bool) -> type[PreTrainedModel]:
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(
            f"{folder} is quantised ({config.quantization_config}); this version "
            "streams unquantised checkpoints only"
        )
    names = config.architectures or []
    code = trust.own_code(read_json_object(folder / "config.json")) or ""
    if code and is_trusted and (found := _own_class(config, folder, names)):
        return found
    others = []
    for name in names:
        found = getattr(transformers, name, None)
        if not inspect.isclass(found) or not issubclass(found, PreTrainedModel):
            continue
        wanted = found.config_class
        if wanted is None or isinstance(config, wanted):
            return found
        others.append(f"{name} needs a {wanted.__name__}")
    if others:
        raise CheckpointError(
            f"{folder}/config.json contradicts itself: model_type "
            f"{config.model_type!r} is a {type(config).__name__}, but {others[0]}"
        )
    if code:
        raise trust.refuse_code(folder / "config.json", code)
    raise UsageError(
        f"{folder}/config.json names the architectures {names}, none of which "
        f"transformers {transformers.__version__} has; models with code of their own "
        "can be built by you and given to penstock.wrap"
    )


def _own_class(
    config: Any, folder: Path, names: list[str]
) -> type[PreTrainedModel] | None:
    """The class that a trusted checkpoint brings along for one of its architectures."""
    found = getattr(config, "auto_map", None) or {}
    for reference in found.values() if isinstance(found, dict) else ():
        if isinstance(reference, str) and reference.rpartition(".")[2] in names:
            load: Any = transformers.dynamic_module_utils.get_class_from_dynamic_module
            with about(f"{folder}/config.json", CheckpointError):
                kind: type[PreTrainedModel] = load(
                    reference, str(folder), local_files_only=True
                )
            return kind
    return None


def set_generation(model: Any, folder: Path, is_trusted: bool) -> None:
    """What generation_config.json says and, if it is trusted, a `generate` of the
    checkpoint's own, as transformers takes it."""
    if not model.can_generate():
        return
    path = folder / "generation_config.json"
    if path.exists():
        _check_token_ids(path, read_json_object(path))
        with about(str(path), CheckpointError):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    if is_trusted and (folder / "custom_generate" / "generate.py").exists():
        with about(f"{folder}/custom_generate", CheckpointError):
            own = model.load_custom_generate(folder, **trust.loading(is_trusted))
        model.generate = functools.partial(own, model=model)


def _check_token_ids(path: Path, values: Mapping[str, Any]) -> None:
    """Raises CheckpointError for what is no id of a token where there must be one."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found = values.get(key)
        ids = found if isinstance(found, list) else [found]
        if found is not None and not all(type(one) is int for one in ids):
            raise CheckpointError(f"{path}: {key} must be a number, not {found!r:.60}")


def _choose_dtype(config: Any, checkpoint: Checkpoint, asked: str) -> torch.dtype:
    if asked != "auto":
        found = getattr(torch, asked, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise UsageError(f"dtype {asked!r} is no floating dtype of torch")
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
    """Ties weights and initialises buffers by transformers' own steps. The streamed
    tensors count as initialised; an untied one without a recipe is an error, but for
    the head, which not everybody uses. `unknown`: what the model has no place for, as
    the files call it, by the name it would have. Returns what is to be announced."""
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
        stand_in = absent_parameter(name, model.get_parameter(name), checkpoint.folder)
        owner, _, key = name.rpartition(".")
        store: dict[str, Any] = model.get_submodule(owner)._parameters
        store[key] = stand_in
    info.missing_keys -= set(absent)
    if info.missing_keys:
        names = sorted(info.missing_keys)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise CheckpointError(
            f"{checkpoint.folder} lacks {', '.join(names[:3])}{more}, which "
            f"{type(model).__name__} needs: the checkpoint is incomplete or of another "
            "architecture than config.json says"
        )
    unused = unused_words([unknown[n] for n in info.unexpected_keys], recipes)
    headless = f"{checkpoint.folder} lacks {', '.join(absent)}: it can only embed"
    return tuple(filter(None, (unused, headless if absent else None)))


def _head_names(model: PreTrainedModel) -> set[str]:
    """The parameters of the output embeddings."""
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
