"""Checks the tensors of a checkpoint: their dtype, those that cannot be used, those
that are not used."""

from collections.abc import Iterable, Mapping, Sequence

import torch

from ...io.checkpoint.header import TensorEntry
from ...io.checkpoint.index import Checkpoint
from ...io.codecs.cast import Cast
from ...io.codecs.computed import Computed
from ...io.errors import CheckpointError
from ...io.weights.recipe import Recipe

_NUM_EXAMPLES = 3


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
                    f"quantised, and its config.json has no quantization_config{hint}; "
                    "take an unquantised one"
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
