"""Applies adapters (such as LoRA) to a streamed model, with the library PEFT.

An adapter is small: it is loaded whole and stays on the device.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..io.checkpoint.header import read_header
from ..io.errors import CheckpointError, UsageError
from ..io.regular_file import read_json_object
from .configs.trust import all_of, check_files
from .patterns import check_patterns
from .policy import Policy

CONFIG_FILE = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def adapt(
    model: Any,
    policy: Policy,
    path: Path,
    announce: Callable[[str], None],
    blocks: Sequence[nn.Module] | None,
) -> None:
    """Puts the policy's adapter into the modules of `model`, whose checkpoint is in
    `path`; without one, announces what lies there. Of a model that ranks share, it may
    change modules of `blocks` only: each rank computes its own."""
    if policy.adapter is not None:
        if policy.compile:
            raise UsageError(
                "an adapter changes modules that are compiled: take compile: false"
            )
        before = set(map(id, model.parameters()))
        for unused in apply_adapter(model, policy.adapter):
            announce(unused)
        if blocks is not None:
            _check_inside(model, before, blocks)
    elif (note := adapter_beside(path)) is not None:
        announce(note)


def apply_adapter(model: Any, folder: Path) -> list[str]:
    """Puts the adapter in `folder` into the modules of `model`, for inference.

    Returns what is to be announced. Raises CheckpointError if the folder has no
    adapter, and UsageError if PEFT is missing or the adapter does not fit the model.
    """
    config, kind = _config_of(folder)
    try:
        import peft
    except ImportError:
        raise UsageError(
            f"{folder} is an adapter ({kind}), which needs PEFT: pip install "
            "'penstock[peft]'"
        ) from None
    if not any((folder / name).exists() for name in _WEIGHTS):
        raise CheckpointError(
            f"{folder} has no {_WEIGHTS[0]}: download or save the adapter again"
        )
    modules = [name for name, _ in model.named_modules()]
    check_patterns(f"{folder}/{CONFIG_FILE}", config, modules)
    before = dict(model.named_parameters())
    try:
        with torch.inference_mode(False):
            # Made on meta: a tensor that the files lack takes no memory and is found.
            wrapped = peft.PeftModel.from_pretrained(
                model, folder, low_cpu_mem_usage=True
            )
    except Exception as error:  # PEFT may raise anything that these files cause
        first = " ".join(str(error).partition("\n\n")[0].split())
        raise UsageError(
            f"the adapter in {folder} does not fit {type(model).__name__}: {first}"
        ) from error
    if any(config.is_prompt_learning for config in wrapped.peft_config.values()):
        raise UsageError(
            f"{folder} is an adapter that learns prompts ({kind}); those that change "
            "modules can be applied, such as LoRA"
        )
    _check_filled(model, before, folder)
    model.train(False)
    used = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return _unused(folder, set(used))


def _check_inside(
    model: nn.Module, before: set[int], blocks: Sequence[nn.Module]
) -> None:
    """Raises UsageError for a parameter that was not there `before`, outside of
    `blocks`."""
    inside = {id(p) for block in blocks for p in block.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in before and id(parameter) not in inside:
            raise UsageError(
                f"the adapter changes the model outside of its blocks ({name}), which "
                "ranks do not share: run it on one rank"
            )


def _unused(folder: Path, used: set[str]) -> list[str]:
    """Says which tensors of the adapter are not used.

    Says nothing if PEFT has renamed tensors: then some that are used have names that
    the file lacks.
    """
    path = folder / _WEIGHTS[0]
    if not path.exists():
        return []
    names = {entry.name for entry in read_header(path)[1]}
    left = sorted(names - used)
    if not left or used - names:
        return []
    return [
        f"{len(left)} of {len(names)} tensors of the adapter in {folder} have no place "
        f"by its {CONFIG_FILE}, and are not used, such as {left[0]:.200}"
    ]


def _check_filled(model: Any, before: dict[str, Any], folder: Path) -> None:
    """Raises CheckpointError if the adapter's files lack a tensor that its config
    needs, or have replaced a weight of the model."""
    own = set(map(id, before.values()))
    after = dict(model.named_parameters())
    for name, parameter in after.items():
        if id(parameter) not in own and parameter.is_meta:
            raise CheckpointError(
                f"{folder} lacks the tensor of {name}, which its {CONFIG_FILE} asks "
                "for: download or save the adapter again"
            )
    left = set(map(id, after.values()))
    for name, parameter in before.items():
        if id(parameter) not in left:
            raise CheckpointError(
                f"{folder} holds a weight of the model itself ({name}), which an "
                "adapter cannot replace in a streamed model: merge it into the "
                "checkpoint"
            )


def without_wrapper(model: Any) -> Any:
    """The model in `model` that tasks need: for a PeftModel, its base model, which
    contains the adapter's modules. Raises UsageError for adapters that learn
    prompts."""
    configs = getattr(model, "peft_config", None)
    if configs is None or not hasattr(type(model), "get_base_model"):
        return model
    if any(config.is_prompt_learning for config in configs.values()):
        raise UsageError(
            f"{type(model).__name__} learns prompts, which would be left out: adapters "
            "that change modules can be used, such as LoRA"
        )
    return model.get_base_model()


def adapter_beside(folder: Path) -> str | None:
    """What to announce if there is an adapter in the checkpoint's folder; else None."""
    if not (folder / CONFIG_FILE).exists():
        return None
    return (
        f"{folder} has an adapter ({_config_of(folder)[1]}), which is not applied: "
        f"--adapter {folder} applies it"
    )


def _config_of(folder: Path) -> tuple[dict[str, Any], str]:
    """The adapter's config, and its kind. Raises CheckpointError."""
    try:
        check_files(folder)
        config = read_json_object(folder / CONFIG_FILE, fix="save it with PEFT")
    except CheckpointError as error:
        raise CheckpointError(f"{folder} has no adapter: {error}") from None
    if config.get("megatron_config"):
        raise CheckpointError(
            f"{folder}/{CONFIG_FILE} asks for code from elsewhere (megatron_core: "
            f"{config.get('megatron_core')!r:.100}), which is not run: take "
            "megatron_config out"
        )
    for key, value in all_of(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise CheckpointError(
                f"{folder}/{CONFIG_FILE} has {key}: {value}, which is not a number to "
                "compute with: save the adapter again"
            )
    return config, str(config.get("peft_type", "unknown"))[:40]
