"""What a checkpoint's tensors say of themselves, beside the config: the dtype they are
kept in, those that cannot be used as they are, those that nobody uses."""

from collections.abc import Iterable, Mapping, Sequence

import torch

from ...io.checkpoint.header import TensorEntry
from ...io.checkpoint.index import Checkpoint
from ...io.errors import CheckpointError
from ...io.weights.recipe import Recipe

_NUM_EXAMPLES = 3


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype | None:
    """What transformers takes where the config has no dtype: that of the first floating
    tensor, by name, of the first file, by name. None where that file has none."""
    first = min((entry.path for entry in checkpoint.entries.values()), default=None)
    here = (e for _, e in sorted(checkpoint.entries.items()) if e.path == first)
    return next((e.dtype for e in here if e.dtype.is_floating_point), None)


def check_readable(recipes: Iterable[Recipe], checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for weights kept as integers or as 8-bit floats where the
    model has floats: they are quantised, and without a `quantization_config` nobody
    knows how."""
    for recipe in recipes:
        for entry in entries_of(recipe):
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


def entries_of(recipe: Recipe) -> Sequence[TensorEntry]:
    """The stored tensors that a parameter is made of."""
    return (*(part.entry for part in recipe.slices), *recipe.entries)


def unused_words(names: Sequence[str], recipes: Mapping[str, Recipe]) -> str | None:
    """What is announced where the files have tensors, `names`, that the model has no
    place for."""
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
