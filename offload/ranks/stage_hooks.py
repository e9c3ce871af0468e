"""The hooks on the stages that this rank computes, and the forwards of the others."""

import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin
from transformers.utils.generic import ModelOutput

from ...io.errors import UsageError
from ...scheduler.ranks.stages import EMBEDDING, Address
from .exchange import CHECKS, Exchange
from .stage_modules import StageModules

_OF_LOGITS = ("logits", "loss")
_NOT_HERE = ("output_hidden_states", "output_attentions", "output_router_logits")


class StageHooks:
    """Ties the stages of `model` to `exchange`, until `remove`. Made after the hooks of
    sites: a stage is entered before its site is, and left after it."""

    def __init__(
        self, model: nn.Module, modules: StageModules, exchange: Exchange
    ) -> None:
        self._exchange = exchange
        self._reads_ids = modules.reads_ids
        self._checks_left = CHECKS
        self._handles: list[Any] = []
        self._replaced: list[tuple[nn.Module, Any]] = []
        self._handles += [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]
        last = len(modules.blocks)
        for stage, module in enumerate(modules.all):
            if exchange.stages.is_own(stage):
                self._hang(stage, module)
            elif stage == EMBEDDING:
                if modules.reads_ids:  # else all ranks make its inputs
                    self._replace(module, self._embedding(module))
            elif stage <= last:
                self._replace(module, self._block(stage, module))
            else:
                self._replace(module, self._head(stage, module))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module, forward in self._replaced:
            if vars(module).get("forward") is forward:
                del module.forward
        self._replaced.clear()

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        _check_outputs(module, args, kwargs)
        num, is_named = kwargs.get("logits_to_keep"), kwargs.get("return_dict", True)
        is_few = isinstance(num, int) and num > 0 and is_named is not False
        if not self._reads_ids:
            self._exchange.note_inputs((*args, *kwargs.values()))
        self._exchange.kept_back.begin_forward(only_logits=is_few)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        is_part = self._exchange.kept_back.end_forward()
        if is_part and self._checks_left and isinstance(output, ModelOutput):
            self._checks_left -= 1
            _check_only_logits(output)

    def _hang(self, stage: int, module: nn.Module) -> None:
        exchange = self._exchange
        called: ContextVar[Address | None] = ContextVar("called", default=None)

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            exchange.check_inputs(stage, (*args, *kwargs.values()))
            ids = args[0] if stage == EMBEDDING and args else None
            called.set(exchange.enters(stage, ids))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            address = called.get()
            if address is None:
                return
            called.set(None)
            error = sys.exception()
            if output is None and error is not None:
                exchange.fails(stage, address, error)
            else:
                exchange.leaves(stage, address, output)

        self._handles += [
            module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
            module.register_forward_hook(after, always_call=True),
        ]

    def _replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        module.forward = forward
        self._replaced.append((module, forward))

    def _embedding(self, module: Any) -> Callable[..., Any]:
        dtype, width = module.weight.dtype, module.weight.shape[1]

        def forward(ids: torch.Tensor) -> Any:
            shape = torch.Size((*ids.shape, width))
            return self._exchange.call_elsewhere(EMBEDDING, shape, dtype, ids)

        return forward

    def _block(self, stage: int, module: nn.Module) -> Callable[..., Any]:
        layers = _layers_of(module, stage - 1)

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            for value in (*args, *kwargs.values()):
                if isinstance(value, Cache):
                    for layer in layers:
                        _lengthen(value, layer, hidden)
            return self._exchange.call_elsewhere(
                stage, hidden.shape, hidden.dtype, hidden
            )

        return forward

    def _head(self, stage: int, module: Any) -> Callable[..., Any]:
        width = module.weight.shape[0]

        def forward(hidden: torch.Tensor) -> Any:
            shape = torch.Size((*hidden.shape[:-1], width))
            return self._exchange.call_elsewhere(stage, shape, hidden.dtype, hidden)

        return forward


def _check_outputs(module: Any, args: Any, kwargs: Any) -> None:
    """Raises UsageError for a forward that shall return what only one rank has."""
    config = getattr(module, "config", None)
    for key in _NOT_HERE:
        given = kwargs.get(key)
        if getattr(config, key, False) if given is None else given:
            raise UsageError(
                f"{key} is not there on several ranks, each of which has a part of it: "
                "run the model on one rank"
            )


def _check_only_logits(output: ModelOutput) -> None:
    """Raises UsageError if `output` has other numbers than logits, of which this rank
    has NaNs."""
    for key, value in output.items():
        if key in _OF_LOGITS or not isinstance(value, torch.Tensor):
            continue
        if value.is_floating_point() and value.isnan().any():
            raise UsageError(
                f"{key} is not there on several ranks when logits_to_keep is given: "
                "leave that out, or run the model on one rank"
            )


def _layers_of(module: nn.Module, block: int) -> list[int]:
    """The layers of a cache that `module`, a block, fills: those of its parts."""
    parts = {getattr(part, "layer_idx", None) for part in module.modules()}
    if len(parts - {None}) > 1:  # a block with several counts itself, too
        own = [part for part in module.modules() if part is not module]
        parts = {getattr(part, "layer_idx", None) for part in own}
    return sorted(layer for layer in parts if layer is not None) or [block]


def _lengthen(cache: Cache, layer: int, hidden: torch.Tensor) -> None:
    """Lengthens a layer of `cache` by the tokens of `hidden`, [rows, tokens, width]:
    their keys and values are on another rank, and only their number is asked here."""
    empty = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
    layers = cache.layers
    if layer < len(layers) and not _counts_tokens(layers[layer]):
        raise UsageError(
            f"a {type(layers[layer]).__name__} keeps more than keys and values, which "
            "ranks cannot divide: run it on one rank"
        )
    cache.update(empty, empty, layer)


def _counts_tokens(layer: Any) -> bool:
    return isinstance(layer, CacheLayerMixin)
