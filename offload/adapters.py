"""Adapters (LoRA and their like) on a streamed model, through the library PEFT. What
they add is small: it is loaded whole and stays on the device."""

from pathlib import Path
from typing import Any

import torch

from ..io.errors import CheckpointError, UsageError
from ..io.whole import read_json_object
from .weights.trust import check_files

CONFIG_FILE = "adapter_config.json"


def apply_adapter(model: Any, folder: Path) -> None:
    """Puts the adapter in `folder` into the modules of `model`, for inference. Raises
    CheckpointError for a folder without one, UsageError where PEFT is missing or the
    adapter does not fit."""
    kind = _kind_of(folder)
    try:
        import peft
    except ImportError:
        raise UsageError(
            f"{folder} is an adapter ({kind}), which needs PEFT: pip install "
            "'penstock[peft]'"
        ) from None
    try:
        with torch.inference_mode(False):
            wrapped = peft.PeftModel.from_pretrained(model, folder)
    except Exception as error:  # whatever its files make PEFT raise
        first = " ".join(str(error).partition("\n\n")[0].split())
        raise UsageError(
            f"the adapter in {folder} does not fit {type(model).__name__}: {first}"
        ) from error
    if any(config.is_prompt_learning for config in wrapped.peft_config.values()):
        raise UsageError(
            f"{folder} is an adapter that learns prompts ({kind}); those that change "
            "modules can be applied, such as LoRA"
        )
    model.train(False)


def without_wrapper(model: Any) -> Any:
    """What computes in `model`, as its tasks need it: of a PeftModel the language model
    that its adapters have been put into."""
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
    """What is announced where an adapter lies beside a checkpoint, if one does."""
    if not (folder / CONFIG_FILE).exists():
        return None
    return (
        f"{folder} has an adapter ({_kind_of(folder)}), which is not applied: "
        f"--adapter {folder} applies it"
    )


def _kind_of(folder: Path) -> str:
    try:
        check_files(folder)
        config = read_json_object(folder / CONFIG_FILE, fix="save it with PEFT")
    except CheckpointError as error:
        raise CheckpointError(f"{folder} is no folder of an adapter: {error}") from None
    if config.get("megatron_config"):
        raise CheckpointError(
            f"{folder}/{CONFIG_FILE} asks for code from elsewhere (megatron_core: "
            f"{config.get('megatron_core')!r:.100}), which is not run: take "
            "megatron_config out"
        )
    return str(config.get("peft_type", "unknown"))[:40]
