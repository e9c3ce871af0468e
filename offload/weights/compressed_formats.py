"""How compressed-tensors keeps quantised weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...io.checkpoint.header import TensorEntry
from ...io.codecs.codec import Codec
from ...io.codecs.codes import Codes
from ...io.codecs.kernels import ScaleBlocks
from ...io.codecs.scaled import Divisor, Offsets, Scaled
from ...io.errors import CheckpointError, UsageError
from ...io.weights.recipe import TensorSlice, View
from ..configs.modelopt import GROUP
from .stored import check_filled, check_scales, not_for

_KNOWN = {
    ("pack-quantized", "int", 4),
    ("int-quantized", "int", 8),
    ("naive-quantized", "int", 8),
    ("naive-quantized", "float", 8),
    ("float-quantized", "float", 8),
    ("nvfp4-pack-quantized", "float", 4),
    ("mxfp4-pack-quantized", "float", 4),
}
"""What compressed-tensors writes and can be streamed: format, type and bits."""
_OTHER_ORDERS = ("group", "dynamic")
"""Orders of columns that need a table (`weight_g_idx`)."""
_WITH_DIVISOR = "nvfp4-pack-quantized"
"""The format whose scales are divided by one number (`weight_global_scale`)."""
_PACKED_FLOATS = (_WITH_DIVISOR, "mxfp4-pack-quantized")
_GROUPED = ("group", "tensor_group")
_STRATEGIES = (*_GROUPED, "block", "channel", "tensor")
"""What shares a scale, as compressed-tensors calls it."""


def compressed_format(config: Any, is_merged: bool) -> "CompressedFormat":
    """The format that a config of compressed-tensors describes.

    Raises UsageError if it has several, or one that cannot be streamed.
    """
    groups = list(config.config_groups.values())
    weights = groups[0].weights
    found = [group.format or config.format for group in groups]
    kind, *others = sorted(set(map(_word, found)))
    if others or any(group.weights != weights for group in groups):
        what = f"several formats ({', '.join((kind, *others))})"
    elif weights is None:
        what = "a format that it does not describe"
    elif (kind, _word(weights.type), weights.num_bits) not in _KNOWN:
        what = f"the format {kind}, {weights.num_bits} bits"
    elif _word(weights.actorder) in _OTHER_ORDERS:
        what = f"columns in another order (actorder: {_word(weights.actorder)})"
    elif _word(weights.strategy) not in _STRATEGIES:
        what = f"scales by the strategy {_word(weights.strategy)}"
    else:
        if is_merged and kind == _WITH_DIVISOR:
            raise UsageError(
                "transformers does not know how experts in NVFP4 are dequantised: take "
                "a release in W4A16, W8A8 or FP8, or an unquantised one"
            )
        return CompressedFormat(
            kind,
            _word(weights.type) == "float",
            _blocks(weights),
            is_symmetric=weights.symmetric,
            is_exact=is_merged and _word(weights.type) == "float",
            divisor=Divisor.INVERSE
            if GROUP in config.config_groups
            else Divisor.STORED,
        )
    raise UsageError(
        f"compressed-tensors keeps these weights in {what}, which this version does "
        "not stream: take a release in W4A16, W8A8 or FP8, or an unquantised one"
    )


def _blocks(weights: Any) -> ScaleBlocks | None:
    """What shares a scale; None if it is a row, or the whole weight."""
    if _word(weights.strategy) == "block":
        return ScaleBlocks(*weights.block_structure)
    if _word(weights.strategy) in _GROUPED:
        return ScaleBlocks(1, weights.group_size)
    return None


def _word(value: Any) -> str:
    """A word of a config, which may be a member of an enumeration."""
    return str(getattr(value, "value", value))


@dataclass(frozen=True)
class CompressedFormat:
    """What compressed-tensors writes: 4-bit integers in words, 8-bit integers, 8-bit
    floats, 4-bit floats."""

    kind: str
    is_float: bool
    """Whether the codes are floats, or integers."""
    blocks: ScaleBlocks | None
    """What shares a scale; None if it is a row, or the whole weight."""
    is_symmetric: bool
    is_exact: bool
    """Whether products are not rounded to the dtype of the scales, as transformers
    does it for 8-bit floats of experts."""
    divisor: Divisor = Divisor.STORED
    """How global scales are stored, where there are any."""
    numbers = ("weight_packed", "weight")

    def is_quantised(self, parts: Mapping[str, TensorEntry]) -> bool:
        return "weight_scale" in parts

    def slices(
        self, parts: Mapping[str, TensorEntry], target: View
    ) -> list[TensorSlice]:
        scales = parts["weight_scale"]
        weight = parts.get("weight_packed", parts.get("weight"))
        assert weight is not None, "weights without numbers are refused before"
        if self.kind in _PACKED_FLOATS:
            return [self._packed_floats(weight, scales, parts, target)]
        zeros = parts.get("weight_zero_point")
        if self.is_symmetric and self.kind == "pack-quantized":
            zeros = None
        rounding = torch.float32 if self.is_exact else scales.dtype
        if rounding not in (torch.float32, torch.bfloat16, torch.float16):
            raise CheckpointError(
                f"{scales.path}: {scales.name!r} is kept as {scales.dtype}, which "
                "scales are not: download or copy it again"
            )
        if zeros is None and not self.is_symmetric:
            raise CheckpointError(
                f"{weight.path}: {weight.name!r} has no weight_zero_point beside it: "
                "the checkpoint is incomplete; download or copy it again"
            )
        companions = (scales,) if zeros is None else (scales, zeros)
        codec = self._codec(weight, scales, zeros, rounding, target)
        return [
            TensorSlice(weight, View.whole(weight.shape), target, codec, companions)
        ]

    def _scale_blocks(
        self, weight: TensorEntry, scales: TensorEntry, shape: tuple[int, ...]
    ) -> ScaleBlocks:
        """The blocks that `scales` are for, of a weight of `shape`. Raises
        CheckpointError unless they are those that the config says, as
        compressed-tensors does: which ones they are could only be guessed."""
        check_scales(scales)
        rows, columns = shape
        said = self.blocks
        if said is None:
            if scales.shape in ((), (1,), (1, 1), (rows, 1)):
                is_one = scales.shape != (rows, 1) or rows == 1
                return ScaleBlocks(0 if is_one else 1, columns)
        elif scales.shape == said.grid(shape) and (
            said.rows != 1 or columns % said.columns == 0
        ):
            is_one = scales.shape[0] == 1 < rows
            return ScaleBlocks(0 if is_one else said.rows, said.columns)
        raise not_for(scales, weight, shape, said)

    def _packed_floats(
        self,
        weight: TensorEntry,
        scales: TensorEntry,
        parts: Mapping[str, TensorEntry],
        target: View,
    ) -> TensorSlice:
        """The slice of two 4-bit floats in a byte."""
        rows, columns = weight.shape if len(weight.shape) == 2 else (0, 0)
        shape = (rows, 2 * columns)
        check_filled(weight, shape, target)
        has_divisor = self.kind == _WITH_DIVISOR
        kind = torch.float8_e4m3fn if has_divisor else torch.uint8
        for entry, wanted in ((weight, torch.uint8), (scales, kind)):
            if entry.dtype != wanted:
                raise CheckpointError(
                    f"{entry.path}: {entry.name!r} is kept as {entry.dtype}, which the "
                    f"format {self.kind} does not have: download or copy it again"
                )
        blocks = self._scale_blocks(weight, scales, shape)
        companions, way = [scales], Divisor.NONE
        if has_divisor:
            divisor = parts.get("weight_global_scale")
            if divisor is None:
                raise CheckpointError(
                    f"{weight.path}: {weight.name!r} has no weight_global_scale beside "
                    "it: the checkpoint is incomplete; download or copy it again"
                )
            if divisor.dtype != torch.float32 or divisor.shape not in ((1,), ()):
                raise not_for(divisor, weight, shape)
            companions.append(divisor)
            way = self.divisor
        codec = Scaled(Codes.FLOAT4_E2M1, blocks, torch.bfloat16, divisor=way)
        whole = View.whole(weight.shape)
        return TensorSlice(weight, whole, target, codec, tuple(companions))

    def _codec(
        self,
        weight: TensorEntry,
        scales: TensorEntry,
        zeros: TensorEntry | None,
        rounding: torch.dtype,
        target: View,
    ) -> Codec:
        is_packed = self.kind == "pack-quantized"
        wanted = torch.int32 if is_packed else torch.int8
        if weight.dtype == torch.float8_e4m3fn and self.is_float:
            check_filled(weight, weight.shape, target)
            if zeros is not None:
                raise not_for(zeros, weight, weight.shape)
            blocks = self._scale_blocks(weight, scales, weight.shape)
            return Scaled(Codes.FLOAT8_E4M3, blocks, rounding)
        if weight.dtype != wanted or self.is_float:
            raise CheckpointError(
                f"{weight.path}: {weight.name!r} is kept as {weight.dtype}, which the "
                f"format {self.kind} does not have: download or copy it again"
            )
        rows, columns = weight.shape if len(weight.shape) == 2 else (0, 0)
        shape = (rows, columns * 8 if is_packed else columns)
        check_filled(weight, shape, target)
        blocks = self._scale_blocks(weight, scales, shape)
        _, across = blocks.grid(shape)
        zero_shape = (-(-rows // 8), across) if is_packed else scales.shape
        if zeros is not None and (zeros.dtype, zeros.shape) != (wanted, zero_shape):
            raise not_for(zeros, weight, shape)
        if not is_packed:
            offsets = Offsets.NONE if zeros is None else Offsets.INT8
            return Scaled(Codes.INT8, blocks, rounding, offsets)
        if blocks.rows != 1 and rows > 1:
            raise not_for(scales, weight, shape)
        offsets = Offsets.NONE if zeros is None else Offsets.PACKED
        return Scaled(Codes.INT4, ScaleBlocks(1, blocks.columns), rounding, offsets)
