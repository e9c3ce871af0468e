"""Finds out what a transformers model keeps of each token, by running a few tokens
through it on meta: nothing is derived from its config.

The model's own forward makes its own cache. Modules that cannot run on meta, such as
experts that are chosen by values, answer with their input. Of blocks that are alike
only the first one runs, and stands for the others.
"""

import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .alike_blocks import alike_blocks
from .cache_contents import (
    Kept,
    kept_in,
    kind_of,
    loose_in,
    nbytes_of,
    sizes_of,
    storage_of,
    tensors_in,
    together,
)
from .meta_twin import meta_twin
from .on_meta import OnMeta

_TOKENS = 2
"""Tokens of the first call. The second one has one more."""
_FAILURES = (
    RuntimeError,  # NotImplementedError, too
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
)
"""What modules raise that do not run on meta."""
_UPDATES = ("update", "update_conv_state", "update_recurrent_state", "update_indexer")
"""The methods of transformers' caches by which modules keep something."""
_CACHES = ("past_key_values", "cache_params", "state", "mems")
"""What transformers' models call a cache, in their outputs and arguments."""


@dataclass(frozen=True, slots=True)
class CacheTrace:
    """What the modules of a model keep, by their names."""

    kept: Mapping[str, Kept]
    state_bytes: int
    """Bytes of a sequence that no single module keeps."""
    ran: frozenset[str] | None
    """The modules that ran for text; None: all count as if they had."""


class NotTracedError(Exception):
    """A model whose cache cannot be traced; the message says why."""


def trace_cache(model: Any) -> CacheTrace:
    """Traces the cache of `model`, a transformers model that may be streamed or on
    meta. Raises NotTracedError where that is impossible."""
    problem: Exception | None = None
    for skips, has_positions in itertools.product((True, False), (False, True)):
        run = _Run(model, skips=skips)
        try:
            return run.trace(has_positions=has_positions)
        except Exception as error:
            problem = problem or run.problem or error
    words = " ".join(str(problem).split())
    raise NotTracedError(f"{type(problem).__name__}: {words[:160]}") from problem


@dataclass
class _Seen:
    """What was seen of one module."""

    width: int = 0
    expanded: int = 0
    flops: float = 0.0


class _Run:
    """The calls of one model's twin."""

    def __init__(self, model: Any, *, skips: bool) -> None:
        self._model: Any = meta_twin(model)
        self._names = {id(m): n for n, m in self._model.named_modules()}
        self._alike = alike_blocks(self._model) if skips else {}
        self._stack: list[str] = [""]
        self._ran: set[str] = set()
        self._covered: set[str] = set()
        """Modules that answered with their input, or for which another one ran."""
        self._seen: dict[str, _Seen] = {}
        self._keepers: dict[tuple[str, int], str] = {}
        """The module of each layer of the cache, by part and index: the one that keeps
        keys and values there, if there are several."""
        self._results: dict[str, Any] = {}
        self._caches: dict[str, Any] = {}
        self._context = 0
        self.problem: Exception | None = None
        """The first reason why a module did not run."""

    def trace(self, *, has_positions: bool) -> CacheTrace:
        from transformers.cache_utils import Cache

        self._cache_class = Cache
        for name, module in self._model.named_modules():
            if name:
                module.__dict__["forward"] = self._guarded(name, module)
        is_seq2seq = bool(self._model.config.is_encoder_decoder)
        with torch.no_grad(), OnMeta(self):
            first = self._call(_TOKENS, {}, has_positions)
            caches = {n: v for n in _CACHES if (v := _get(first, n)) is not None}
            before = {key: sizes_of(layer) for key, layer in self._layers(caches)}
            self._context = _TOKENS + 1
            second = self._call(1, caches, has_positions)
        layers = dict(self._layers(caches))
        self._check(layers)
        kept = self._kept(layers, before)
        old = [t for n, v in caches.items() for t in loose_in(n, v, Cache)]
        new = [t for n in caches for t in loose_in(n, _get(second, n), Cache)]
        grown = sum(t.numel() for t in new) - sum(t.numel() for t in old)
        if grown > 0:
            kept[""] = Kept(own_per_token=grown)
        loose = 0 if grown > 0 else sum(map(nbytes_of, old))
        ran = None if is_seq2seq else self._all_that_ran()
        return CacheTrace(kept, loose, ran)

    def _call(self, num: int, caches: Mapping[str, Any], has_positions: bool) -> Any:
        model = self._model
        known = inspect.signature(type(model).forward).parameters
        past = _TOKENS if caches else 0
        ids = torch.ones((1, num), dtype=torch.long)
        given: dict[str, Any] = {"use_cache": True, "return_dict": True, **caches}
        if model.config.is_encoder_decoder:
            given["decoder_input_ids"] = ids
            if model.main_input_name == "input_ids":
                given["input_ids"] = torch.ones((1, _TOKENS), dtype=torch.long)
            else:
                given["encoder_outputs"] = self._encoded()
        else:
            given["input_ids"] = ids
        if has_positions:
            given["position_ids"] = torch.arange(past, past + num)[None]
        return model(**{k: v for k, v in given.items() if k in known})

    def _encoded(self) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        config = self._model.config
        decoder = config.get_text_config(decoder=True)
        hidden = getattr(config, "hidden_size", None) or decoder.hidden_size
        dtype = next(self._model.parameters()).dtype
        states = torch.empty((1, _TOKENS, hidden), dtype=dtype, device="meta")
        return BaseModelOutput(last_hidden_state=states)

    def _guarded(self, name: str, module: nn.Module) -> Callable[..., Any]:
        """The forward of `module`, which answers with its input where it fails."""
        forward = type(module).forward
        first = self._alike.get(name)

        def run(*args: Any, **kwargs: Any) -> Any:
            for value in (*args, *kwargs.values()):
                if isinstance(value, self._cache_class):
                    self._watch(value)
            self._ran.add(name)
            if first is not None and first in self._results:
                self._covered.add(name)
                return self._results[first]
            self._stack.append(name)
            try:
                result = forward(module, *args, **kwargs)
            except _FAILURES as error:
                self.problem = self.problem or error
                self._covered.add(name)
                result = next(tensors_in((args, kwargs)), None)
                if result is None:
                    raise
            finally:
                self._stack.pop()
            self._results[name] = result
            return result

        return run

    def _watch(self, cache: Any) -> None:
        """Notes which modules keep something in `cache`."""
        parts = {
            "self": getattr(cache, "self_attention_cache", cache),
            "cross": getattr(cache, "cross_attention_cache", None),
        }
        for part, own in parts.items():
            if own is None or "update" in vars(own):
                continue
            self._caches[part] = own
            for name in _UPDATES:
                if hasattr(own, name):
                    setattr(own, name, self._watched(part, getattr(own, name)))

    def _watched(self, part: str, update: Callable[..., Any]) -> Callable[..., Any]:
        known = inspect.signature(update)

        def noted(*args: Any, **kwargs: Any) -> Any:
            index = known.bind(*args, **kwargs).arguments["layer_idx"]
            if update.__name__ == "update" or (part, index) not in self._keepers:
                self._keepers[part, index] = self._stack[-1]
            self._seen.setdefault(self._stack[-1], _Seen())
            return update(*args, **kwargs)

        return noted

    @property
    def here(self) -> _Seen:
        """What was seen of the module that runs."""
        return self._seen.setdefault(self._stack[-1], _Seen())

    def attend(self, query: Any, key: Any, value: Any) -> Any:
        """Notes a call of attention; the result is a tensor of its shape."""
        seen = self.here
        heads, length = query.shape[-3], key.shape[-2]
        seen.width = heads * (key.shape[-1] + value.shape[-1]) // 2
        if self._context and length == self._context:
            stored = {
                storage_of(t)
                for cache in self._caches.values()
                for t in tensors_in([vars(layer) for layer in cache.layers])
            }
            made = {
                storage_of(t): t for t in (key, value) if storage_of(t) not in stored
            }
            elements = sum(
                t.untyped_storage().nbytes() // t.element_size() for t in made.values()
            )
            repeated = heads * (key.shape[-1] + value.shape[-1])
            if not made and key.shape[-3] < heads:  # repeated where there is a mask
                elements = repeated * length
            seen.expanded = max(seen.expanded, elements // length)
        return query.new_empty((*query.shape[:-1], value.shape[-1]))

    def multiply(self, rows: int, weight: Any) -> None:
        """Notes a product of `rows` rows: those of the whole context are made of what
        is kept."""
        if self._context and rows == self._context and len(self._stack) > 2:
            owner = self._seen.setdefault(self._stack[-2], _Seen())
            owner.flops += 2.0 * weight.numel()

    def _layers(self, caches: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
        """The layers of the cache, by part and index."""
        for cache in caches.values():
            if isinstance(cache, self._cache_class):
                self._watch(cache)
        for part, cache in self._caches.items():
            for index, layer in enumerate(cache.layers):
                yield (part, index), layer

    def _check(self, layers: Mapping[Any, Any]) -> None:
        """Raises NotTracedError if there are other layers in the cache than those of
        the blocks that ran and of those that are like them."""
        from transformers.cache_utils import DynamicLayer

        if layers and not self._keepers:
            raise NotTracedError("its cache stayed empty")
        wanted = Counter(kind_of(key, layers[key]) for key in self._keepers)
        for name, first in self._alike.items():
            if name in self._ran:
                wanted.update(
                    kind_of(key, layers[key])
                    for key, keeper in self._keepers.items()
                    if keeper == first or keeper.startswith(f"{first}.")
                )
        there = Counter(
            kind_of(key, layer)
            for key, layer in layers.items()
            if type(layer).__name__ != "DummyLayer"
        )
        for kind in wanted | there:
            part, layer_class, _ = kind
            grows = getattr(self._caches[part], "layer_class_to_replicate", None)
            # Layers that never keep anything may keep it in their modules.
            is_unused = not wanted[kind] and not issubclass(layer_class, DynamicLayer)
            if grows is None and not is_unused and wanted[kind] != there[kind]:
                raise NotTracedError(
                    f"{there[kind]} layers of its cache are {layer_class.__name__}, "
                    f"and {wanted[kind]} were filled"
                )

    def _kept(
        self, layers: Mapping[Any, Any], before: Mapping[Any, Any]
    ) -> dict[str, Kept]:
        found: dict[str, Kept] = {}
        for name, seen in self._seen.items():
            keys = [key for key, keeper in self._keepers.items() if keeper == name]
            parts = [
                kept_in(key, layers[key], before.get(key, {}), _TOKENS) for key in keys
            ]
            found[name] = replace(
                together(parts),
                width=seen.width,
                expanded_per_token=seen.expanded,
                expanded_flops=seen.flops,
            )
        for name, first in self._alike.items():
            if name in self._ran:
                inside = f"{first}."
                found.update(
                    (name + key[len(first) :], value)
                    for key, value in list(found.items())
                    if key == first or key.startswith(inside)
                )
        return found

    def _all_that_ran(self) -> frozenset[str]:
        """The modules that ran, and those inside of others that stood for them."""
        return frozenset(
            name
            for name in self._names.values()
            if name in self._ran or any(up in self._covered for up in _above(name))
        )


def _above(name: str) -> Iterator[str]:
    """The names of the modules around the module `name`."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _get(result: Any, name: str) -> Any:
    return result.get(name) if isinstance(result, Mapping) else None
