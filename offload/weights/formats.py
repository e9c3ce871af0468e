"""Formats of quantised weights: which stored tensors make a weight, by which codec."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ...io.checkpoint.header import TensorEntry
from ...io.codecs.codes import Codes
from ...io.codecs.kernels import ScaleBlocks
from ...io.codecs.scaled import Scaled
from ...io.errors import CheckpointError, UsageError
from ...io.weights.recipe import TensorSlice, View
from .compressed_formats import compressed_format
from .stored import check_filled, not_for, scale_blocks

_FLOATS = {
    torch.float8_e4m3fn: Codes.FLOAT8_E4M3,
    torch.float8_e5m2: Codes.FLOAT8_E5M2,
}


class Format(Protocol):
    """What the tensors of one weight are called, and how they go together."""

    @property
    def numbers(self) -> tuple[str, ...]:
        """What the tensor of the weight itself may be called."""
        ...

    def is_quantised(self, parts: Mapping[str, TensorEntry]) -> bool:
        """Whether a weight with these `parts` is quantised."""
        ...

    def slices(
        self, parts: Mapping[str, TensorEntry], target: View
    ) -> list[TensorSlice]:
        """The slices of a quantised weight, which fill `target`.

        Raises CheckpointError if the parts do not go together, or do not fit.
        """
        ...


def format_of(operation: Any, *, is_merged: bool) -> Format:
    """The format that transformers' `operation` dequantises; what it makes `is_merged`
    by other operations, or is a weight of the model."""
    name = type(operation).__name__
    settings: Any = getattr(operation.hf_quantizer, "quantization_config", None)
    if name == "Fp8Dequantize":
        found = settings.weight_block_size
        return Fp8Format(ScaleBlocks(*found) if found else None)
    if name == "CompressedTensorsDequantize":
        config = operation.hf_quantizer.compressor.quantization_config
        return compressed_format(config, is_merged)
    if name == "Mxfp4Dequantize":
        return MxFormat()
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

    def slices(
        self, parts: Mapping[str, TensorEntry], target: View
    ) -> list[TensorSlice]:
        weight, scales = parts["weight"], parts["weight_scale_inv"]
        if weight.dtype == torch.int8:  # two in a byte: experts of DeepSeek-V4
            rows, columns = weight.shape if len(weight.shape) == 2 else (0, 0)
            shape = (rows, 2 * columns)
            check_filled(weight, shape, target)
            blocks = scale_blocks(weight, scales, shape, self.blocks)
            codec = Scaled(Codes.FLOAT4_E2M1, blocks)
            source = View.whole(weight.shape)
            return [TensorSlice(weight, source, target, codec, (scales,))]
        codes = _FLOATS.get(weight.dtype)
        if codes is None:
            raise CheckpointError(
                f"{weight.path}: {weight.name!r} has scales, but is kept as "
                f"{weight.dtype}, which is no 8-bit float: take a release in FP8, or "
                "an unquantised one"
            )
        check_filled(weight, weight.shape, target)
        blocks = scale_blocks(weight, scales, weight.shape, self.blocks)
        source, codec = View.whole(weight.shape), _scaled(codes, blocks)
        return [TensorSlice(weight, source, target, codec, (scales,))]


@functools.cache
def _scaled(codes: Codes, blocks: ScaleBlocks) -> Scaled:
    """One codec for thousands of tensors."""
    return Scaled(codes, blocks)


@dataclass(frozen=True)
class MxFormat:
    """Stacked experts of 4-bit floats, 32 of them with a scale (gpt-oss).

    They are [experts, rows, groups, 16] of bytes, and scales [experts, rows, groups];
    the parameter is [experts, 32 * groups, rows].
    """

    numbers = ("gate_up_proj_blocks", "down_proj_blocks")

    def is_quantised(self, parts: Mapping[str, TensorEntry]) -> bool:
        return any(part.endswith("_scales") for part in parts)

    def slices(
        self, parts: Mapping[str, TensorEntry], target: View
    ) -> list[TensorSlice]:
        weight = next(entry for part, entry in parts.items() if part in self.numbers)
        scales = next(entry for part, entry in parts.items() if part.endswith("scales"))
        shape = weight.shape if len(weight.shape) == 4 else (0, 0, 0, 0)
        experts, rows, groups, nbytes = shape
        if (experts, 32 * groups, rows) != target.shape or nbytes != 16:
            raise CheckpointError(
                f"{weight.path}: {weight.name!r} has shape {list(weight.shape)}, but "
                f"the model has {list(target.shape)} there: config.json is of another "
                "model"
            )
        for entry, wanted in ((weight, shape), (scales, shape[:3])):
            if (entry.dtype, entry.shape) != (torch.uint8, wanted):
                raise not_for(entry, weight, shape)
        size, columns = rows * groups, 32 * groups
        codec = Scaled(Codes.FLOAT4_E2M1, ScaleBlocks(1, 32))
        return [
            TensorSlice(
                weight,
                _from(16 * size * i, (rows, 16 * groups)),
                View(columns * rows * i, (rows, columns), (1, rows)),
                codec,
                (scales,),
                (_from(size * i, (rows, groups)),),
            )
            for i in range(experts)
        ]


def _from(offset: int, shape: tuple[int, ...]) -> View:
    """A contiguous part of `shape` from the element `offset` on."""
    return View(offset, shape, View.whole(shape).stride)
