"""Chooses the weights of a model that are converted."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ...io.checkpoint.header import TensorEntry
from ...io.checkpoint.index import Checkpoint
from ...io.codecs.cast import CAST
from ...io.codecs.packed import columns_of, row_bytes_of
from ...io.errors import CheckpointError, UsageError
from ...io.weights.recipe import Recipe, View
from ..weights import hf
from .schemes import SCALES, Scheme

_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
"""Layers beside one another that engines run as one: all are quantised, or none is."""


@dataclass(frozen=True, slots=True)
class ChosenWeights:
    """What is converted, and what is left."""

    weights: frozenset[str]
    """The names of the stored tensors that are converted."""
    ignored: tuple[str, ...] = ()
    """The modules whose weights are left, though they are no embeddings or norms."""


def choose_linear(checkpoint: Checkpoint, scheme: Scheme, ignore: str) -> ChosenWeights:
    """The weights of linear layers, and of experts that are stored one by one, which
    `scheme` takes; but for those of modules whose name `ignore`, a regex, is found in.

    Raises UsageError if there are none, CheckpointError for weights in a dtype that
    cannot be quantised.
    """
    pattern = _compiled(ignore)
    skeleton = hf.build(checkpoint, "auto")
    modules = dict(skeleton.model.named_modules())
    wanted: dict[str, TensorEntry] = {}
    ignored = {n for n, m in modules.items() if isinstance(m, nn.Linear)}
    for name, recipe in skeleton.recipes.items():
        owner = name.rpartition(".")[0]
        found = list(_linear(recipe, modules[owner]))
        if not found and len(recipe.shape) > 1:
            if not isinstance(modules[owner], nn.Embedding):
                ignored.add(owner)
            continue
        for module, entry in found:
            stored = _module_of(entry)
            if pattern.search(module) or pattern.search(stored):
                ignored |= {module, stored}
                continue
            _check_dtype(entry)
            if scheme.takes(entry):
                wanted[module] = entry
            else:
                ignored |= {module, stored}
    for module in _without_others(wanted, ignored):
        ignored |= {module, _module_of(wanted.pop(module))}
    if not wanted:
        raise UsageError(
            f"{checkpoint.folder} has no linear layer that can be stored as "
            f"{scheme.target} (columns a multiple of the group, not ignored): its "
            "weights stay as they are"
        )
    ignored -= wanted.keys()
    return ChosenWeights(
        frozenset(e.name for e in wanted.values()), tuple(sorted(ignored))
    )


def choose_lossless(checkpoint: Checkpoint, ignore: str) -> ChosenWeights:
    """The matrices of bfloat16, but for embedding tables, whose rows are read one by
    one, and for modules whose name `ignore`, a regex, is found in.

    Raises UsageError if there are none.
    """
    pattern = _compiled(ignore)
    skeleton = hf.build(checkpoint, "auto")
    weights = set()
    for name, recipe in skeleton.recipes.items():
        owner = name.rpartition(".")[0]
        if isinstance(skeleton.model.get_submodule(owner), nn.Embedding):
            continue
        for entry in recipe.entries:
            is_ignored = pattern.search(owner) or pattern.search(_module_of(entry))
            if can_pack(entry) and not is_ignored:
                weights.add(entry.name)
    if not weights:
        dtypes = sorted({str(e.dtype)[6:] for e in checkpoint.entries.values()})
        raise UsageError(
            f"{checkpoint.folder} has no matrix of bfloat16 to be packed, which is "
            f"what lossless is for: its tensors are {', '.join(dtypes)}"
        )
    return ChosenWeights(frozenset(weights))


def can_pack(weight: TensorEntry) -> bool:
    """Whether a weight can be stored packed: a matrix, or matrices, of bfloat16, whose
    rows have a number of columns that keeps what lies behind them aligned."""
    columns = weight.shape[-1] if len(weight.shape) > 1 else 0
    return (
        weight.dtype == torch.bfloat16
        and weight.nbytes > 0
        and columns % 4 == 0
        and columns_of(row_bytes_of(columns)) == columns
    )


def _compiled(ignore: str) -> re.Pattern[str]:
    try:
        return re.compile(ignore or r"(?!)")
    except re.error as error:
        raise UsageError(f"--ignore {ignore!r} is no regex: {error}") from None


def _linear(recipe: Recipe, owner: nn.Module) -> Iterator[tuple[str, TensorEntry]]:
    """The weights of linear layers that make `recipe`, a parameter of `owner`: the
    name of the layer in the model, and what is stored."""
    if not all(
        part.codec == CAST and part.source == View.whole(part.entry.shape)
        for part in recipe.slices
    ):
        return
    entries = recipe.entries
    if isinstance(owner, nn.Linear):
        if len(entries) == 1 and len(entries[0].shape) == 2:
            yield recipe.name.rpartition(".")[0], entries[0]
    elif len(recipe.shape) == 3 and all(_is_expert(entry) for entry in entries):
        for entry in entries:
            yield _module_of(entry), entry


def _is_expert(entry: TensorEntry) -> bool:
    is_weight = entry.name.endswith(".weight") and len(entry.shape) == 2
    return is_weight and re.search(r"(^|\.)experts\.\d+\.", entry.name) is not None


def _module_of(entry: TensorEntry) -> str:
    """The module that holds a stored tensor, as the files call it."""
    return entry.name.rpartition(".")[0]


def _check_dtype(entry: TensorEntry) -> None:
    if entry.dtype not in SCALES:
        names = ", ".join(str(dtype)[6:] for dtype in SCALES)
        raise CheckpointError(
            f"{entry.path}: {entry.name!r} is kept as {str(entry.dtype)[6:]}, and only "
            f"weights in {names} are quantised: take a release in one of these"
        )


def _without_others(wanted: dict[str, TensorEntry], ignored: set[str]) -> list[str]:
    """Those of `wanted` beside which one is ignored that they are fused with."""
    beside: dict[str, set[str]] = defaultdict(set)
    for module in {*wanted, *ignored}:
        for key in _fused_with(module):
            beside[key].add(module)
    return sorted(
        module
        for modules in beside.values()
        if not modules <= wanted.keys()
        for module in modules & wanted.keys()
    )


def _fused_with(module: str) -> Iterator[str]:
    """A name for the layers that `module` is run with as one, if it is."""
    if expert := re.match(r"(.*\b)?experts\.\d+\.", module):
        yield f"{expert[1] or ''}experts"
        return
    parent, _, last = module.rpartition(".")
    for layers in _FUSED:
        if last in layers:
            yield f"{parent} {layers}"
