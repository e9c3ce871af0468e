"""Says how a quantised checkpoint keeps the weights of a model, from its config
alone."""

import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ...io.checkpoint.header import TensorEntry
from ...io.codecs.codes import Codes
from ...io.codecs.kernels import ScaleBlocks
from ...io.codecs.scaled import Scaled
from ...io.weights.recipe import TensorSlice, View
from .compressed_formats import compressed_format
from .formats import Format, Fp8Format, MxFormat

Shape = tuple[int, ...]
_STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Parameters of stacked experts, and what a checkpoint has of each expert for them."""
_EXPERTS = ".experts"
"""How the names of modules of stacked experts end."""


class Part(NamedTuple):
    """A stored tensor of a weight."""

    dtype: torch.dtype
    shape: Shape


@dataclass(frozen=True)
class PublishedScheme:
    """Which weights are quantised, and in which stored tensors they are kept."""

    linears: frozenset[str]
    """The names of the modules that are matrix products."""
    is_left_out: Callable[[str], bool]
    """Whether a module of this name is not quantised."""
    format_of: Callable[[bool], Format]
    """The format of a weight, or of a stack of them (true)."""
    parts_of: Callable[[str, Shape], dict[str, Part]]
    """The stored tensors of the parameter of a module, by its key and shape; the rows
    of a stack are those of all its weights."""
    block_rows: int = 1
    """Rows that share a scale: parts begin at multiples of it."""

    def covers(self, name: str, shape: Shape) -> bool:
        """Whether the parameter `name` of `shape` is quantised."""
        owner, _, key = name.rpartition(".")
        if self.is_left_out(owner):
            return False
        if len(shape) == 2:
            return key == "weight" and owner in self.linears
        if len(shape) != 3 or not owner.endswith(_EXPERTS):
            return False
        each = (f"{owner}.0.{part}" for part in _STACKS.get(key, (key,)))
        return not any(map(self.is_left_out, each))

    def stored(self, key: str, shape: Shape) -> Iterator[tuple[View, dict[str, Part]]]:
        """The parts of a parameter, each with the stored tensors that make it: one, or
        one for each weight of a stack whose rows are no whole blocks."""
        parts = self.parts_of
        if len(shape) == 2:
            yield View.whole(shape), parts(key, shape)
        elif shape[1] % self.block_rows == 0:
            rows = (shape[0] * shape[1], shape[2])
            yield View.whole(rows), parts(key, shape)
        else:
            size = shape[1] * shape[2]
            for index in range(shape[0]):
                target = View(index * size, shape[1:], (shape[2], 1))
                yield target, parts(key, shape[1:])


def scheme_of(
    model: PreTrainedModel,
    quantizer: Any,
    compressed: Any,
    stored: torch.dtype,
    left_out: Iterable[str],
) -> PublishedScheme | None:
    """The scheme of transformers' `quantizer` for `model`, or of the settings of
    compressed-tensors (`compressed`); None without either.

    `stored` is the dtype of scales where the format says none. `left_out` are patterns
    of modules that are not quantised, beside those that the settings name.
    """
    linears = frozenset(_linears(model))
    if compressed is not None:
        ignored = (*compressed.ignore, *left_out)
        return _compressed(compressed, linears, ignored, stored)
    if quantizer is None:
        return None
    settings = quantizer.quantization_config
    method = str(getattr(settings.quant_method, "value", settings.quant_method))
    is_left_out = _skipping(model, quantizer)
    if method == "mxfp4":  # only experts
        return PublishedScheme(frozenset(), is_left_out, lambda _: _Rows(), _mx_parts)
    found = settings.weight_block_size
    blocks = ScaleBlocks(*found) if found else None
    scales = torch.uint8 if method == "mxfp8" else torch.float32

    def parts(key: str, shape: Shape) -> dict[str, Part]:
        rows, columns = _flat(shape)
        grid = _grid(shape, blocks)
        return {
            "weight": Part(torch.float8_e4m3fn, (rows, columns)),
            "weight_scale_inv": Part(scales, grid),
        }

    rows = blocks.rows if blocks else 1
    return PublishedScheme(
        linears, is_left_out, lambda _: Fp8Format(blocks), parts, rows
    )


def _linears(model: PreTrainedModel) -> Iterator[str]:
    """The names of modules that are matrix products."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name


def _skipping(model: PreTrainedModel, quantizer: Any) -> Callable[[str], bool]:
    """Whether transformers leaves a module as it is."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    settings = quantizer.quantization_config
    normalize = getattr(quantizer, "_normalize_modules_to_not_convert", None)
    if normalize is not None:
        normalize(model)
    names = quantizer.get_modules_to_not_convert(
        model, settings.modules_to_not_convert, model._keep_in_fp32_modules
    )
    return lambda name: not should_convert_module(name, names)


def _flat(shape: Shape) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1]


def _grid(shape: Shape, blocks: ScaleBlocks | None) -> Shape:
    """The shape of scales: without `blocks`, each weight has one."""
    num = shape[0] if len(shape) == 3 else 1
    if blocks is None:
        return (num, 1)
    down, across = blocks.grid((shape[-2], shape[-1]))
    return (num * down, across)


def _mx_parts(key: str, shape: Shape) -> dict[str, Part]:
    """Those of stacked experts [experts, columns, rows]."""
    experts, columns, rows = shape
    groups = columns // 32
    return {
        f"{key}_blocks": Part(torch.uint8, (experts * rows, groups * 16)),
        f"{key}_scales": Part(torch.uint8, (experts * rows, groups)),
    }


class _Rows(MxFormat):
    """Takes the rows of all experts as one weight: its bytes are right, the order of
    its elements is not."""

    def slices(
        self, parts: Mapping[str, TensorEntry], target: View
    ) -> list[TensorSlice]:
        weight, scales = parts.values()
        codec = Scaled(Codes.FLOAT4_E2M1, ScaleBlocks(1, 32))
        rows, nbytes = weight.shape
        place, source = View.whole((rows, 2 * nbytes)), View.whole(weight.shape)
        return [TensorSlice(weight, source, place, codec, (scales,))]


def _compressed(
    config: Any, linears: frozenset[str], ignored: tuple[str, ...], stored: torch.dtype
) -> PublishedScheme:
    """The scheme of a config of compressed-tensors."""
    group = next(iter(config.config_groups.values()))
    weights, strategy = group.weights, _word(group.weights.strategy)
    kind = _word(group.format or config.format)
    is_float = _word(weights.type) == "float"

    def blocks_of(shape: Shape) -> ScaleBlocks | None:
        if strategy == "tensor":
            return None
        if strategy == "block":
            return ScaleBlocks(*weights.block_structure)
        size = weights.group_size if strategy in ("group", "tensor_group") else None
        return ScaleBlocks(1, size or shape[-1])

    def parts(key: str, shape: Shape) -> dict[str, Part]:
        rows, columns = _flat(shape)
        grid = _grid(shape, blocks_of(shape))
        if kind in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
            is_nv = kind.startswith("nv")
            scales = torch.float8_e4m3fn if is_nv else torch.uint8
            found = {
                "weight_packed": Part(torch.uint8, (rows, columns // 2)),
                "weight_scale": Part(scales, grid),
            }
            if is_nv:
                found["weight_global_scale"] = Part(torch.float32, (1,))
            return found
        if kind == "pack-quantized":
            found = {"weight_packed": Part(torch.int32, (rows, columns // 8))}
            zeros = Part(torch.int32, (-(-grid[0] // 8), grid[1]))
        else:
            dtype = torch.float8_e4m3fn if is_float else torch.int8
            found = {"weight": Part(dtype, (rows, columns))}
            zeros = Part(torch.int8, grid)
        found["weight_scale"] = Part(stored, grid)
        if not weights.symmetric:
            found["weight_zero_point"] = zeros
        return found

    rows = weights.block_structure[0] if strategy == "block" else 1
    return PublishedScheme(
        linears,
        lambda name: _is_ignored(name, ignored),
        lambda is_stack: compressed_format(config, is_stack),
        parts,
        rows,
    )


def _is_ignored(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of compressed-tensors' `patterns` is of the module `name`: a regex
    after "re:", a name or its end, or a name with asterisks."""
    for pattern in patterns:
        is_regex = pattern.startswith("re:")
        if is_regex and re.match(pattern[3:], name):
            return True
        if not is_regex and (
            name.endswith(f".{pattern}") or fnmatch.fnmatchcase(name, pattern)
        ):
            return True
    return False


def _word(value: Any) -> str:
    """A word of a config, which may be a member of an enumeration."""
    return str(getattr(value, "value", value))
