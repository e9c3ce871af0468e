"""Reads the config files of a checkpoint: its config, its model class, its generation
config."""

import contextlib
import functools
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from ...io.errors import CheckpointError, UsageError
from ...io.regular_file import read_json_object
from ...io.user_errors import about
from . import aliases, trust

_LAYERS = re.compile(r"(^|_)(n|num|encoder|decoder|hidden)_?(layers?|blocks?)$|^depth$")
"""Keys of a config that say how many blocks there are."""
_FEW_LAYERS = 256
"""A number of blocks up to this is accepted even if there are fewer tensors: some
models run a block repeatedly."""


def of_config(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Use it around calls that use the values of config.json and can fail only because
    of them."""
    fix = "no model can be made of what it says"
    return about(f"{folder}/config.json", CheckpointError, fix=fix, every=True)


def read_config(folder: Path, is_trusted: bool) -> Any:
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(
            f"{folder} has no config.json: no Hugging Face checkpoint"
        )
    trust.check_files(folder)
    values = trust.read_config(folder, is_trusted=is_trusted)
    _check_section(path, values)
    code, kind = trust.own_code(values), aliases.known_type(values)
    if code is not None and not (is_trusted or kind):
        raise trust.refuse_code(path, code)
    with about(str(path), CheckpointError):
        config = _config_of(folder, values, kind, is_trusted)
    if not is_trusted:
        trust.without_code(config)
    names = config.architectures or []
    if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
        raise CheckpointError(
            f"{path}: architectures must be a list of names, not {names!r:.100}"
        )
    return config


def _config_of(
    folder: Path, values: Mapping[str, Any], kind: str | None, is_trusted: bool
) -> Any:
    if kind is not None and aliases.is_renamed(values) and not is_trusted:
        config_class = transformers.CONFIG_MAPPING[kind]
        return config_class.from_dict(aliases.renamed(values))
    return AutoConfig.from_pretrained(folder, **trust.loading(is_trusted))


def _check_section(path: Path, values: Mapping[str, Any]) -> None:
    """Raises CheckpointError if a `quantization_config` is no object."""
    for part in (values, *values.values()):
        found = part.get("quantization_config") if isinstance(part, dict) else None
        if found is not None and not isinstance(found, dict):
            raise CheckpointError(
                f"{path}: quantization_config must be an object that says how weights "
                f"are quantised, not {found!r:.60}: download or copy it again"
            )


def check_layers(config: Any, folder: Path, *, num_tensors: int) -> None:
    """Raises CheckpointError if a config has more blocks than the files have tensors,
    before a billion of them are made."""
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    for part in parts:
        for key, value in vars(part).items() if part is not None else ():
            if not isinstance(value, int) or not _LAYERS.search(key):
                continue
            if value < 0:
                raise CheckpointError(
                    f"{folder}/config.json: {key} is {value:,}, which is not a number "
                    "of blocks: download or copy it again"
                )
            if value > max(num_tensors, _FEW_LAYERS):
                raise CheckpointError(
                    f"{folder}/config.json: {key} is {value:,}, but the checkpoint has "
                    f"{num_tensors:,} tensors: it is of another model"
                )


def model_class_of(
    config: Any, folder: Path, is_trusted: bool
) -> type[PreTrainedModel]:
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
    if names and (made := aliases.registered_class(config, names)):
        return made
    raise UsageError(
        f"{folder}/config.json names the architectures {names}, none of which "
        f"transformers {transformers.__version__} has; models with code of their own "
        "can be built by you and given to penstock.wrap"
    )


def other_name(folder: Path, kind: type[PreTrainedModel]) -> tuple[str, ...]:
    """What to announce if `kind` is not what config.json in `folder` names."""
    names = read_json_object(folder / "config.json").get("architectures") or []
    if kind.__name__ in names or not names:
        return ()
    return (
        f"{folder}/config.json names {names[0]}, which transformers has as "
        f"{kind.__name__}: that is used",
    )


def _own_class(
    config: Any, folder: Path, names: list[str]
) -> type[PreTrainedModel] | None:
    """The class that a trusted checkpoint brings for one of its architectures; None if
    it brings none."""
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
    """Sets the model's generation config from generation_config.json.

    If it is trusted, the checkpoint's own `generate` is set as well, as transformers
    does.
    """
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
    """Raises CheckpointError if a token id is not a number."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found = values.get(key)
        ids = found if isinstance(found, list) else [found]
        if found is not None and not all(type(one) is int for one in ids):
            raise CheckpointError(f"{path}: {key} must be a number, not {found!r:.60}")
