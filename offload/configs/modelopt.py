"""Reads checkpoints of NVIDIA's Model Optimizer as those of compressed-tensors.

They keep the same numbers under other names (compressed-tensors has a converter for
them). What they say of activations is not used: only weights are quantised here.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ...io.checkpoint.header import TensorEntry
from ...io.checkpoint.index import Checkpoint
from ...io.errors import CheckpointError, UsageError
from ...io.regular_file import read_json_object

_FILE = "hf_quant_config.json"
_WEIGHTS: dict[str, tuple[str, dict[str, Any]]] = {
    "NVFP4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "strategy": "tensor_group", "group_size": 16},
    ),
    "FP8": ("float-quantized", {"num_bits": 8, "strategy": "tensor"}),
}
"""The formats and settings of compressed-tensors, by Model Optimizer's `quant_algo`."""
GROUP = "model_optimizer"
"""The only one of the `config_groups`: its NVFP4 has a global scale that multiplies,
where that of compressed-tensors divides."""
_OF_ACTIVATIONS = ("input_scale", "k_scale", "v_scale")


def modelopt_section(config: Any, folder: Path) -> dict[str, Any] | None:
    """The `quantization_config` of compressed-tensors for a checkpoint of Model
    Optimizer in `folder`; None if it is none, or if only its keys and values are to be
    quantised: then the section is taken out of `config`.

    Which modules are left out is not used: those have no scales. Raises UsageError for
    a format that is not streamed.
    """
    found = getattr(config, "quantization_config", None)
    if found is None and (folder / _FILE).is_file():
        found = read_json_object(folder / _FILE)
        found = {"quant_method": "modelopt", **_dict(found.get("quantization"))}
    if not isinstance(found, dict) or found.get("quant_method") != "modelopt":
        return None
    algorithm = found.get("quant_algo")
    if algorithm is None:
        config.__dict__.pop("quantization_config", None)
        return None
    if not isinstance(algorithm, str) or algorithm not in _WEIGHTS:
        raise UsageError(
            f"{folder} is quantised by Model Optimizer ({str(algorithm)[:100]}), and "
            f"only {' and '.join(_WEIGHTS)} can be streamed: take such a release, or "
            "an unquantised one"
        )
    kind, weights = _WEIGHTS[algorithm]
    group = {
        "targets": ["Linear"],
        "format": kind,
        "weights": {"type": "float", "symmetric": True, "dynamic": False, **weights},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {GROUP: group},
        "ignore": [],
    }


def modules_left_out(config: Any, folder: Path) -> tuple[str, ...]:
    """Patterns of the modules that Model Optimizer left as they were, as the checkpoint
    in `folder` names them; none for another one."""
    found = getattr(config, "quantization_config", None)
    if found is None and (folder / _FILE).is_file():
        found = _dict(read_json_object(folder / _FILE).get("quantization"))
    if not isinstance(found, dict):
        return ()
    names = found.get("exclude_modules") or (
        found.get("ignore") if found.get("quant_method") == "modelopt" else ()
    )
    return tuple(n for n in names or () if isinstance(n, str))


def as_compressed(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint`, of Model Optimizer, with the names that compressed-tensors has.

    Raises CheckpointError if two tensors get one name.
    """
    entries: dict[str, TensorEntry] = {}
    for name, entry in checkpoint.entries.items():
        new = _name(name, entry)
        if new is None:
            continue
        if new in entries:
            raise CheckpointError(
                f"{entry.path}: {name!r} and {entries[new].name!r} are both there, for "
                "one weight: download or copy it again"
            )
        entries[new] = replace(entry, name=new)
    return replace(checkpoint, entries=MappingProxyType(entries))


def _name(name: str, entry: TensorEntry) -> str | None:
    """The name in compressed-tensors; None for what is about activations."""
    module, _, part = name.rpartition(".")
    if part in _OF_ACTIVATIONS:
        return None
    if part == "weight" and entry.dtype == torch.uint8:
        return f"{module}.weight_packed"
    if part == "weight_scale_2":
        return f"{module}.weight_global_scale"
    return name


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
