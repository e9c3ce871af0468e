"""Checks the tensors of a checkpoint: their dtype, their scales, those that cannot be
used, those that are not used."""

import functools
from collections.abc import Iterable, Mapping, Sequence

import torch

from ...io.checkpoint.header import TensorEntry
from ...io.checkpoint.index import Checkpoint
from ...io.codecs.cast import Cast
from ...io.codecs.computed import Computed
from ...io.codecs.kernels import ScaleBlocks
from ...io.errors import CheckpointError
from ...io.weights.recipe import Recipe, View

_NUM_EXAMPLES = 3
_SCALES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e8m0fnu,
    torch.float8_e4m3fn,
    torch.uint8,
)
"""The dtypes that scales may have; bytes are exponents."""


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype | None:
    """The dtype of the first floating tensor of more than 8 bits, by name, in the first
    file, by name; None if there is none.

    transformers uses it if the config names no dtype.
    """
    first = min((entry.path for entry in checkpoint.entries.values()), default=None)
    here = (e for _, e in sorted(checkpoint.entries.items()) if e.path == first)
    floats = (e.dtype for e in here if e.dtype.is_floating_point)
    return next((dtype for dtype in floats if dtype.itemsize > 1), None)


def check_readable(recipes: Iterable[Recipe], checkpoint: Checkpoint) -> None:
    """Raises CheckpointError if weights are stored as integers or 8-bit floats, but the
    model has floats.

    They are quantised, and neither a `quantization_config` nor a codec says how.
    """
    for recipe in recipes:
        plain = (p for p in recipe.slices if isinstance(p.codec, Cast | Computed))
        for entry in (entry for part in plain for entry in part.entries):
            if recipe.dtype.is_floating_point and _is_quantised(entry, recipe.dtype):
                beside = "hf_quant_config.json"
                has_other = (checkpoint.folder / beside).exists()
                hint = f" (its scales are as {beside} says)" if has_other else ""
                raise CheckpointError(
                    f"{entry.path}: {entry.name!r} is kept as {entry.dtype}, and the "
                    f"model's {recipe.name!r} is {recipe.dtype}: the checkpoint is "
                    "quantised, and its config.json does not say how, in "
                    f"quantization_config{hint}; take an unquantised one"
                )


def unused_words(names: Sequence[str], recipes: Mapping[str, Recipe]) -> str | None:
    """What to announce if the files have tensors, `names`, that the model does not
    have."""
    if not names:
        return None
    examples = ", ".join(sorted(names)[:_NUM_EXAMPLES])
    more = ", ..." if len(names) > _NUM_EXAMPLES else ""
    return (
        f"{len(names)} tensors of the files are not used, beside {len(recipes)} that "
        f"are: config.json describes a smaller or another model ({examples}{more})"
    )


def _is_quantised(entry: TensorEntry, wanted: torch.dtype) -> bool:
    if entry.dtype == wanted:
        return False
    return not entry.dtype.is_floating_point or entry.dtype.itemsize == 1


def check_filled(entry: TensorEntry, shape: tuple[int, ...], target: View) -> None:
    """Raises CheckpointError unless a weight of `shape` fills `target`."""
    if len(shape) != 2 or shape != target.shape:
        raise CheckpointError(
            f"{entry.path}, tensor {entry.name!r} holds a weight of {list(shape)}, but "
            f"the model has {list(target.shape)} there: config.json is of another "
            "model, or weights of this shape cannot be streamed quantised"
        )


def check_scales(scales: TensorEntry) -> None:
    """Raises CheckpointError if `scales` are in a dtype that scales do not have."""
    if scales.dtype not in _SCALES:
        raise CheckpointError(
            f"{scales.path}: {scales.name!r} is kept as {scales.dtype}, which scales "
            "are not: download or copy it again"
        )


def scale_blocks(
    weight: TensorEntry,
    scales: TensorEntry,
    shape: tuple[int, ...],
    said: ScaleBlocks | None,
) -> ScaleBlocks:
    """The blocks that `scales` are for, of a weight of `shape`.

    They are as the config says (`said`), where the shape of `scales` fits that. Else
    the weight is divided evenly, as transformers does it: experts may have other blocks
    than the rest, and the config does not say so.
    """
    check_scales(scales)
    found = _fitting(shape, scales.shape, said)
    if found is None:
        raise not_for(scales, weight, shape, said)
    return found


@functools.lru_cache(maxsize=4096)
def _fitting(
    shape: tuple[int, ...], scales_shape: tuple[int, ...], said: ScaleBlocks | None
) -> ScaleBlocks | None:
    """The same, by shapes: thousands of weights share few. None if they do not fit."""
    rows, columns = shape
    down, across = scales_shape if len(scales_shape) == 2 else (1, 1)
    if said is not None and said.grid(shape) == (down, across):
        return ScaleBlocks(0 if down == 1 else said.rows, said.columns)
    is_one = len(scales_shape) == 2 or scales_shape in ((), (1,))
    if not is_one or not (down and across) or rows % down or columns % across:
        return None
    return ScaleBlocks(0 if down == 1 < rows else rows // down, columns // across)


def not_for(
    scales: TensorEntry,
    weight: TensorEntry,
    shape: tuple[int, ...],
    said: ScaleBlocks | None = None,
) -> CheckpointError:
    beside = f", in blocks of {said.rows} x {said.columns}" if said else ""
    return CheckpointError(
        f"{scales.path}: {scales.name!r} ({scales.dtype}) has shape "
        f"{list(scales.shape)}, which is not that of the scales or zeros of "
        f"{weight.name!r}, {list(shape)}{beside}: download or copy it again"
    )
