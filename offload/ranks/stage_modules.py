"""Finds the stages of a model: its input embedding, its blocks, its head."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...io.errors import UsageError
from ...io.weights.recipe import Recipe
from ...scheduler.ranks.owners import Cost
from ..traces.cache_trace import results_of
from ..units.describe import active_share

TENSOR = "t"
LIST = "["
_WITH_STATES = ("rwkv", "xlstm")
_LARGE = 0.05
"""Another stack of modules is large from this share of the largest one's parameters."""


@dataclass(frozen=True)
class StageModules:
    """The modules of a model that ranks divide among themselves."""

    embedding: nn.Module
    """Of token ids. A model with other inputs has one that is never called: all ranks
    make of their inputs what the first block is given."""
    blocks: tuple[nn.Module, ...]
    head: nn.Module | None
    whole: tuple[str, ...] = ()
    """The names of other large stacks of modules, which each rank has and computes."""

    @property
    def reads_ids(self) -> bool:
        return isinstance(self.embedding, nn.Embedding)

    @property
    def all(self) -> tuple[nn.Module, ...]:
        """The module of each stage, in order."""
        head = () if self.head is None else (self.head,)
        return (self.embedding, *self.blocks, *head)


def find_stages(model: Any) -> StageModules:
    """The stages of `model`, which may be on meta. Raises UsageError, which names the
    model, if ranks cannot share it block by block."""
    name, config = type(model).__name__, getattr(model, "config", None)
    if config is None or not hasattr(model, "get_input_embeddings"):
        raise _refused(name, "it is no model of transformers")
    if getattr(config, "is_encoder_decoder", False):
        raise _refused(name, "each block of its decoder needs what its encoder made")
    text = config.get_text_config()
    if getattr(text, "model_type", "") in _WITH_STATES:
        raise _refused(name, "each block goes on with states of the block before")
    if getattr(text, "num_kv_shared_layers", 0):
        raise _refused(name, "its blocks share keys and values")
    stacks = sorted(_stacks(model), key=_num_elements, reverse=True)
    if not stacks:
        raise _refused(name, "it has no stack of blocks")
    blocks = tuple(stacks[0].children())
    embedding: nn.Module = nn.Identity()
    with suppress(NotImplementedError):
        found = model.get_input_embeddings()
        embedding = found if isinstance(found, nn.Embedding) else embedding
    head = model.get_output_embeddings()
    inside = {id(part) for block in blocks for part in block.modules()}
    if len(set(map(id, blocks))) < len(blocks) or id(head) in inside:
        raise _refused(name, "a block is used in several places")
    uses = Counter(
        id(parameter)
        for block in blocks
        for parameter in {id(p): p for p in block.parameters()}.values()
    )
    others = {
        id(parameter)
        for part in model.modules()
        if id(part) not in inside
        for parameter in part._parameters.values()
    }
    if any(num > 1 for num in uses.values()) or others & set(uses):
        raise _refused(name, "its blocks share weights")
    names = {id(part): path for path, part in model.named_modules()}
    large = _LARGE * _num_elements(stacks[0])
    others_too = [names[id(one)] for one in stacks[1:] if _num_elements(one) > large]
    return StageModules(embedding, blocks, head, tuple(others_too))


def kinds_of(output: Any) -> str | None:
    """What a block returns, as `Message.text` says it; None if there is no tensor that
    could be its hidden states."""
    if isinstance(output, torch.Tensor):
        return ""
    if not isinstance(output, (tuple, list)) or not output:
        return None
    kinds = "".join(TENSOR if _has_tensor(one) else "-" for one in output)
    if isinstance(output, list):
        kinds = LIST + kinds
    return kinds if isinstance(output[0], torch.Tensor) else None


def _has_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_has_tensor, value))
    return isinstance(value, torch.Tensor)


def returns_of(model: nn.Module, blocks: Sequence[nn.Module]) -> tuple[str | None, ...]:
    """What each of the `blocks` returns; None where only running it would say so."""
    results = results_of(model)
    names = {id(module): name for name, module in model.named_modules()}
    found = (results.get(names[id(block)]) for block in blocks)
    return tuple(None if result is None else kinds_of(result) for result in found)


def _refused(name: str, why: str) -> UsageError:
    return UsageError(
        f"{name} cannot be shared by ranks: {why}; run it on one rank, or "
        "several jobs beside each other (--workers)"
    )


def _stacks(model: nn.Module) -> list[nn.ModuleList]:
    """The lists of modules that are in no other list."""
    found: list[nn.ModuleList] = []
    inside: set[int] = set()
    for part in model.modules():
        if isinstance(part, nn.ModuleList) and id(part) not in inside:
            found.append(part)
            inside |= {id(inner) for inner in part.modules()}
    return [stack for stack in found if _num_elements(stack)]


def _num_elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def costs_of(
    model: Any,
    stages: StageModules,
    recipes: Mapping[str, Recipe],
    gather_rows: int,
) -> tuple[list[Cost], Cost]:
    """The bytes and the multiplications a token of each block, and of the embedding and
    the head together. An embedding of `gather_rows` bytes or more is not loaded."""
    nbytes = {
        id(model.get_parameter_or_buffer(name)): recipe.nbytes
        for name, recipe in recipes.items()
    }
    share = active_share(getattr(model, "config", None))

    def cost(module: nn.Module) -> Cost:
        parameters = {id(p): p for p in module.parameters()}
        elements = sum(
            p.numel() * (share if p.dim() > 2 else 1.0) for p in parameters.values()
        )
        return float(sum(nbytes.get(one, 0) for one in parameters)), float(elements)

    table = cost(stages.embedding)[0]
    head = (0.0, 0.0) if stages.head is None else cost(stages.head)
    is_tied = stages.head is not None and any(
        parameter is other
        for parameter in stages.head.parameters()
        for other in stages.embedding.parameters()
    )
    loaded = 0.0 if is_tied or table >= gather_rows else table
    return [cost(block) for block in stages.blocks], (head[0] + loaded, head[1])
