"""What a weight is converted to: its stored tensors, and what config.json says of
them."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from ...io.checkpoint.header import TensorEntry
from ...io.errors import CheckpointError, UsageError
from ...io.weights.recipe import View
from ..weights.lossless import SECTION

TargetFormat = Literal["int4", "int8", "fp8", "lossless"]
_NUMBERS = {"int4": torch.int32, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
_FORMATS = {"int4": "pack-quantized", "int8": "int-quantized", "fp8": "float-quantized"}
_MOST = {"int4": 7.5, "int8": 127.5, "fp8": 448.0}
"""The scaled number that the greatest one of a group becomes. Integers reach from -8 to
7, say: 7.5 is rounded to 8, and cut to 7."""
_PER_WORD = 8
"""4-bit integers in an int32."""
SCALES = (torch.bfloat16, torch.float16, torch.float32)
"""The dtypes of weights that can be quantised, which their scales have, too."""


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return View.whole(self.shape).numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Scheme:
    """Weights of linear layers in few bits, as compressed-tensors stores them.

    Each row, or each group of `group` columns of a row (int4), has a scale.
    """

    target: Literal["int4", "int8", "fp8"]
    group: int = 128

    def __post_init__(self) -> None:
        if self.target == "int4" and (self.group < 8 or self.group % _PER_WORD):
            raise UsageError(
                f"--group {self.group}: groups have a multiple of {_PER_WORD} columns; "
                "usual ones are 32, 64 and 128"
            )

    def takes(self, weight: TensorEntry) -> bool:
        """Whether a weight of this shape can be quantised."""
        if len(weight.shape) != 2 or not weight.nbytes:
            return False
        return self.target != "int4" or weight.shape[1] % self.group == 0

    def tensors(self, weight: TensorEntry) -> tuple[NewTensor, ...]:
        """The tensors of `weight`: its numbers, its scales, and its shape if these do
        not say it."""
        rows, columns = weight.shape
        numbers = _NUMBERS[self.target]
        if self.target != "int4":
            return (
                NewTensor(weight.name, numbers, (rows, columns)),
                NewTensor(f"{weight.name}_scale", weight.dtype, (rows, 1)),
            )
        scales = (rows, columns // self.group)
        return (
            NewTensor(f"{weight.name}_packed", numbers, (rows, columns // _PER_WORD)),
            NewTensor(f"{weight.name}_scale", weight.dtype, scales),
            NewTensor(f"{weight.name}_shape", torch.int64, (2,)),
        )

    def quantise(
        self, rows: torch.Tensor, weight: TensorEntry
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The numbers and scales of some rows of `weight`: [rows, columns] in its
        dtype.

        Raises CheckpointError if there are infinities or NaNs among them.
        """
        wide = rows.to(torch.float32)
        group = self.group if self.target == "int4" else wide.shape[1]
        groups = torch.unflatten(wide, 1, (-1, group))
        most = groups.abs().amax(-1)
        if not most.isfinite().all():
            raise CheckpointError(
                f"{weight.path}: {weight.name!r} has infinities or NaNs, which cannot "
                f"be quantised: take another release of the model, or --ignore "
                f"{weight.name.removesuffix('.weight')}"
            )
        scales = (most / _MOST[self.target]).to(weight.dtype)
        scales.masked_fill_(scales == 0, torch.finfo(weight.dtype).eps)
        scaled = groups.div_(scales.to(torch.float32)[..., None]).flatten(1)
        if self.target == "fp8":
            return scaled.clamp_(-448, 448).to(torch.float8_e4m3fn), scales
        if self.target == "int8":
            return scaled.round_().clamp_(-128, 127).to(torch.int8), scales
        codes = scaled.round_().clamp_(-8, 7).to(torch.int16).add_(8)
        codes = torch.unflatten(codes.to(torch.uint8), 1, (-1, 2))
        return (codes[..., 0] | codes[..., 1] << 4).view(torch.int32), scales

    def section(self, ignore: tuple[str, ...]) -> dict[str, Any]:
        """The `quantization_config`; `ignore` are the modules that are left as they
        are."""
        kind = "float" if self.target == "fp8" else "int"
        bits = 4 if self.target == "int4" else 8
        weights = {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": False}
        inputs = None
        if self.target == "int4":
            weights |= {"strategy": "group", "group_size": self.group}
        else:
            inputs = weights | {"strategy": "token", "dynamic": True}
            weights |= {"strategy": "channel"}
        return {
            "quant_method": "compressed-tensors",
            "format": _FORMATS[self.target],
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": weights,
                    "input_activations": inputs,
                    "output_activations": None,
                    "format": _FORMATS[self.target],
                }
            },
            "ignore": list(ignore),
            "kv_cache_scheme": None,
        }


class Unchanged:
    """Weights of bfloat16 in fewer bytes, with all of their bits: see
    `weights/lossless.py`."""

    target = "lossless"

    def section(self, ignore: tuple[str, ...]) -> dict[str, Any]:
        """The `quantization_config`."""
        return dict(SECTION)
