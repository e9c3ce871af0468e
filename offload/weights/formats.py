"""Formats of quantised weights: which stored tensors make a weight, by which codec."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ...io.checkpoint.header import TensorEntry
from ...io.codecs.fp8 import Fp8
from ...io.codecs.tiles import ScaleBlocks
from ...io.errors import CheckpointError, UsageError
from ...io.weights.recipe import TensorSlice, View

_SCALES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e8m0fnu,
    torch.uint8,
)
"""The dtypes that scales may have; bytes are exponents."""


class Format(Protocol):
    """What the tensors of one weight are called, and how they go together."""

    @property
    def numbers(self) -> tuple[str, ...]:
        """What the tensor of the weight itself may be called."""
        ...

    def is_quantised(self, parts: Mapping[str, TensorEntry]) -> bool:
        """Whether a weight with these `parts` is quantised."""
        ...

    def slice(self, parts: Mapping[str, TensorEntry], target: View) -> TensorSlice:
        """The slice that a quantised weight fills: `target`, [rows, columns].

        Raises CheckpointError if the parts do not go together, or do not fit.
        """
        ...


def format_of(operation: Any) -> Format:
    """The format that transformers' `operation` dequantises."""
    name = type(operation).__name__
    if name == "Fp8Dequantize":
        found = operation.hf_quantizer.quantization_config.weight_block_size
        return Fp8Format(ScaleBlocks(*found) if found else None)
    raise UsageError(
        f"transformers dequantises this checkpoint with {name}, which this version "
        "does not know: take an unquantised release of the model"
    )


def is_coded(dtype: torch.dtype) -> bool:
    """Whether numbers in `dtype` mean nothing without a scale."""
    return not dtype.is_floating_point or dtype.itemsize == 1


@dataclass(frozen=True)
class Fp8Format:
    """8-bit floats and the scales of their blocks (DeepSeek-V3, Qwen3-FP8)."""

    blocks: ScaleBlocks | None
    """The blocks that the config says; None if it says that there are none."""
    numbers = ("weight",)

    def is_quantised(self, parts: Mapping[str, TensorEntry]) -> bool:
        return "weight_scale_inv" in parts

    def slice(self, parts: Mapping[str, TensorEntry], target: View) -> TensorSlice:
        weight, scales = parts["weight"], parts["weight_scale_inv"]
        if not (weight.dtype.is_floating_point and weight.dtype.itemsize == 1):
            raise CheckpointError(
                f"{weight.path}: {weight.name!r} has scales, but is kept as "
                f"{weight.dtype}, which is no 8-bit float: take a release in FP8, or "
                "an unquantised one"
            )
        _check_filled(weight, weight.shape, target)
        blocks = _blocks(weight, scales, self.blocks)
        source = View.whole(weight.shape)
        return TensorSlice(weight, source, target, Fp8(blocks), (scales,))


def _check_filled(entry: TensorEntry, shape: tuple[int, ...], target: View) -> None:
    """Raises CheckpointError unless a weight of `shape` fills `target`."""
    if len(shape) != 2 or shape != target.shape:
        raise CheckpointError(
            f"{entry.path}, tensor {entry.name!r} holds a weight of {list(shape)}, but "
            f"the model has {list(target.shape)} there: config.json is of another "
            "model, or weights of this shape cannot be streamed quantised"
        )


def _blocks(
    weight: TensorEntry, scales: TensorEntry, said: ScaleBlocks | None
) -> ScaleBlocks:
    """The blocks that `scales` are for.

    They are as the config says (`said`), where the shape of `scales` fits that. Else
    the weight is divided evenly, as transformers does it: experts may have other blocks
    than the rest, and the config does not say so.
    """
    if scales.dtype not in _SCALES:
        raise CheckpointError(
            f"{scales.path}: {scales.name!r} is kept as {scales.dtype}, which scales "
            "are not: download or copy it again"
        )
    rows, columns = weight.shape
    down, across = scales.shape if len(scales.shape) == 2 else (1, 1)
    if said is not None and said.grid(weight.shape) == (down, across):
        return ScaleBlocks(0 if down == 1 else said.rows, said.columns)
    is_one = len(scales.shape) == 2 or scales.shape in ((), (1,))
    if not is_one or not (down and across) or rows % down or columns % across:
        beside = f", in blocks of {said.rows} x {said.columns}" if said else ""
        raise CheckpointError(
            f"{scales.path}: {scales.name!r} has shape {list(scales.shape)}, which are "
            f"not the scales of {weight.name!r}, {list(weight.shape)}{beside}: "
            "download or copy it again"
        )
    return ScaleBlocks(0 if down == 1 else rows // down, columns // across)
