"""Finds out which stored tensors make which tensor of a transformers model, and how.

transformers renames, merges and splits tensors when it loads them. Its own mapping is
used here, so each checkpoint that it can load is loaded in the same way.
"""

from collections import defaultdict
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from ...io.checkpoint.index import Checkpoint
from ...io.weights.recipe import Recipe, plain
from .conversions import Target, check_shape, converted
from .dequantising import Dequantising, is_dequantised
from .dtype_plan import DtypePlan


def make_recipes(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    quantizer: Any = None,
) -> tuple[dict[str, Recipe], dict[str, str]]:
    """How to make each parameter and persistent buffer of `model` from `checkpoint`.

    Returns the recipes, by name in the model, for all tensors that the checkpoint
    holds; and the stored tensors that the model does not have: their names in the
    files, by the names that they would have in the model. `quantizer` is transformers'
    own (see `dequantizer_of`), if the checkpoint is quantised.
    """
    state: dict[str, torch.Tensor] = model.state_dict()
    mapping = get_model_conversion_mapping(model, None, quantizer)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    dtypes = DtypePlan(model, dtype)
    recipes: dict[str, Recipe] = {}
    targets: dict[str, Target] = {}
    unknown: dict[str, str] = {}
    for stored in sorted(checkpoint.entries, key=dot_natural_key):
        entry = checkpoint.entries[stored]
        prefix = model.base_model_prefix
        name, pattern = rename_source_key(stored, renamings, converters, prefix, state)
        if name not in state and stored in state:
            name, pattern = rename_source_key(stored, [], [], prefix, state)
        if name not in state:
            unknown[name] = stored  # transformers ignores it
            continue
        if pattern is None:
            recipes[name] = plain(entry, name=name, dtype=dtypes.of(name, state[name]))
            check_shape(recipes[name], state[name], entry)
        else:
            target = targets.setdefault(
                name, Target(by_pattern[pattern], defaultdict(list))
            )
            target.sources[pattern].append(entry)
    dequantising = Dequantising(model, state, dtypes)
    for name, target in targets.items():
        if is_dequantised(target):
            made = dequantising.recipes_of(name, target)
        else:
            made = converted(model, name, target, state, dtypes)
        recipes.update((recipe.name, recipe) for recipe in made)
    used = {entry.name for recipe in recipes.values() for entry in recipe.entries}
    return recipes, {name: s for name, s in unknown.items() if s not in used}
