"""Makes transformers' quantizer for a checkpoint, set to dequantise what it loads."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from ...io.errors import CheckpointError, UsageError
from ...io.user_errors import about

_METHODS = ("fp8", "mxfp8", "mxfp4", "compressed-tensors")
_INSTEAD = "take a release in FP8 or by compressed-tensors, or an unquantised one"
_AGAIN = "download or copy it again"
_DEEPEST = 8
_SIZES = {"group_size": 1, "num_bits": 1, "weight_block_size": 2}
"""Keys of a section, and how many whole numbers they have."""


def dequantizer_of(config: Any, folder: Path) -> Any:
    """Transformers' quantizer for a checkpoint in `folder`; None if it is unquantised.

    It says which stored tensors make a weight. Nothing of what it needs to compute with
    quantised weights has to be installed. The `quantization_config` is taken out of
    `config`: the model is none that computes with them. Raises UsageError for what
    cannot be streamed.
    """
    found = _section_of(config)
    if found is None:
        return None
    from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

    method = found.get("quant_method") if isinstance(found, dict) else None
    if method not in _METHODS:
        raise UsageError(
            f"{folder} is quantised ({str(method or found)[:100]}), which this version "
            f"does not stream: {_INSTEAD}"
        )
    if method == "compressed-tensors" and find_spec("compressed_tensors") is None:
        raise UsageError(
            f"{folder} is quantised by compressed-tensors, which is not installed: "
            'pip install "penstock[quantised]"'
        )
    where = f"{folder}/config.json, quantization_config"
    groups = found.get("config_groups")
    if method == "compressed-tensors" and not (groups and isinstance(groups, dict)):
        raise _no_groups(where, groups)
    _check_sizes(found, where)
    with about(where, CheckpointError, every=True, fix=_AGAIN), _first_fault():
        settings = AutoQuantizationConfig.from_dict(copy.deepcopy(found))
        settings.dequantize = True
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
        if method == "compressed-tensors":  # it needs nothing more, and is set up so
            quantizer.validate_environment()
    if getattr(settings, "modules_to_convert", None):
        raise UsageError(
            f"{folder} keeps embeddings quantised (modules_to_convert), which this "
            f"version does not stream: {_INSTEAD}"
        )
    return quantizer


def _check_sizes(value: Any, where: str, depth: int = 0) -> None:
    """Raises CheckpointError for sizes anywhere in a section that are no whole numbers:
    libraries compute with whatever they find."""
    if isinstance(value, list) and depth < _DEEPEST:
        for each in value:
            _check_sizes(each, where, depth + 1)
    if not isinstance(value, dict) or depth == _DEEPEST:
        return
    for key, found in value.items():
        if key in _SIZES and found is not None:
            sizes = found if _SIZES[key] > 1 else [found]
            if not isinstance(sizes, list) or any(type(n) is not int for n in sizes):
                what = "two whole numbers" if _SIZES[key] > 1 else "a whole number"
                raise CheckpointError(
                    f"{where}: {key} is {found!r:.100}, and must be {what}: {_AGAIN}"
                )
        _check_sizes(found, where, depth + 1)


@contextmanager
def _first_fault() -> Iterator[None]:
    """Says the first of the faults that pydantic lists, in one sentence."""
    try:
        yield
    except ValidationError as error:
        fault = error.errors()[0]
        places = [str(each) for each in fault["loc"] if "(" not in str(each)]
        given = fault["input"]
        raise ValueError(
            f"{'.'.join(places)} is {given!r:.200}: {fault['msg']}"
        ) from error


def _section_of(config: Any) -> Any:
    """The `quantization_config`, which is taken out of `config`; that of its text, if
    only its text is quantised."""
    found = config.__dict__.pop("quantization_config", None)
    if found is None and (text := config.get_text_config()) is not config:
        found = text.__dict__.pop("quantization_config", None)
    return found


def compressed_settings(config: Any, folder: Path) -> Any:
    """The settings of compressed-tensors in `config`, from which they are taken out;
    None if it has none.

    They have the attributes of compressed-tensors' own config, which need not be
    installed. Raises UsageError if they do not say how weights are kept.
    """
    text = config.get_text_config()
    found = vars(config).get("quantization_config")
    found = found or vars(text).get("quantization_config")
    is_compressed = isinstance(found, dict) and (
        found.get("quant_method") == "compressed-tensors"
    )
    if not is_compressed:
        return None
    _section_of(config)
    groups = found.get("config_groups")
    if not (groups and isinstance(groups, dict)):
        raise _no_groups(f"{folder}/config.json, quantization_config", groups)
    _check_sizes(found, f"{folder}/config.json, quantization_config")
    return SimpleNamespace(
        format=found.get("format"),
        ignore=[n for n in found.get("ignore") or () if isinstance(n, str)],
        config_groups={
            name: SimpleNamespace(
                format=group.get("format"), weights=_weights(group.get("weights"))
            )
            for name, group in groups.items()
            if isinstance(group, dict)
        },
    )


def _weights(values: Any) -> Any:
    """The settings of a group's weights; None if it has none."""
    if not isinstance(values, dict):
        return None
    usual = {
        "type": "int",
        "num_bits": 8,
        "symmetric": True,
        "strategy": "tensor",
        "group_size": None,
        "block_structure": None,
        "actorder": None,
    }
    return SimpleNamespace(**{key: values.get(key, usual[key]) for key in usual})


def _no_groups(where: str, groups: Any) -> UsageError:
    return UsageError(
        f"{where}: config_groups is {groups!r:.100}, and does not say how weights "
        f"are kept: {_INSTEAD}"
    )


def prepare(model: PreTrainedModel, quantizer: Any, dtype: torch.dtype) -> None:
    """Makes the modules of `model` (on meta) those that `quantizer` loads, in
    `dtype`."""
    if quantizer.quantization_config.quant_method == "mxfp4":
        return  # it replaces nothing, and would warn of kernels that nobody needs
    quantizer.preprocess_model(
        model, dtype=dtype, device_map=None, checkpoint_files=None, config=model.config
    )
    quantizer.remove_quantization_config(model)
