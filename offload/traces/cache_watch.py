"""Watches the caches that a model fills while it runs: which modules keep something in
them, and how they attend to it."""

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .cache_contents import (
    Kept,
    kept_in,
    kind_of,
    storage_of,
    tensors_in,
    together,
)

_UPDATES = ("update", "update_conv_state", "update_recurrent_state", "update_indexer")
"""The methods of transformers' caches by which modules keep something."""


class NotTracedError(Exception):
    """A model whose cache cannot be traced; the message says why."""


@dataclass
class _Seen:
    """What was seen of one module."""

    width: int = 0
    expanded: int = 0
    flops: float = 0.0


class CacheWatch:
    """What was seen of the caches of one model, and of its attention."""

    def __init__(self, alike: Mapping[str, str]) -> None:
        from transformers.cache_utils import Cache

        self.cache_class = Cache
        self.stack = [""]
        """The names of the modules that run, the outermost first."""
        self.context = 0
        """The tokens that the call attends to; 0 while that does not matter."""
        self._alike = alike
        self._seen: dict[str, _Seen] = {}
        self._keepers: dict[tuple[str, int], str] = {}
        """The module of each layer of the cache, by part and index: the one that keeps
        keys and values there, if there are several."""
        self._caches: dict[str, Any] = {}
        self.seen_cache: Any = None
        """The cache that modules were given last; None if there was none."""

    def watch(self, cache: Any) -> None:
        """Notes which modules keep something in `cache`."""
        self.seen_cache = cache
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
                self._keepers[part, index] = self.stack[-1]
            self._seen.setdefault(self.stack[-1], _Seen())
            return update(*args, **kwargs)

        return noted

    @property
    def here(self) -> _Seen:
        """What was seen of the module that runs."""
        return self._seen.setdefault(self.stack[-1], _Seen())

    def attend(self, query: Any, key: Any, value: Any) -> Any:
        """Notes a call of attention; the result is a tensor of its shape."""
        seen = self.here
        heads, length = query.shape[-3], key.shape[-2]
        seen.width = heads * (key.shape[-1] + value.shape[-1]) // 2
        if self.context and length == self.context:
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
        if self.context and rows == self.context and len(self.stack) > 2:
            owner = self._seen.setdefault(self.stack[-2], _Seen())
            owner.flops += 2.0 * weight.numel()

    def layers(self, caches: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
        """The layers of the cache, by part and index."""
        for cache in caches.values():
            if isinstance(cache, self.cache_class):
                self.watch(cache)
        for part, cache in self._caches.items():
            for index, layer in enumerate(cache.layers):
                yield (part, index), layer

    def check(self, layers: Mapping[Any, Any], ran: Collection[str]) -> None:
        """Raises NotTracedError if there are other layers in the cache than those of
        the blocks that ran and of those that are like them."""
        from transformers.cache_utils import DynamicLayer

        if layers and not self._keepers:
            raise NotTracedError("its cache stayed empty")
        wanted = Counter(kind_of(key, layers[key]) for key in self._keepers)
        for name, first in self._alike.items():
            if name in ran:
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

    def kept(
        self,
        layers: Mapping[Any, Any],
        before: Mapping[Any, Any],
        before_tokens: int,
        ran: Collection[str],
    ) -> dict[str, Kept]:
        """What each module keeps, by its name; blocks that `ran` keep what the first
        one like them does. See `kept_in` for `before`."""
        found: dict[str, Kept] = {}
        for name, seen in self._seen.items():
            keys = [key for key, keeper in self._keepers.items() if keeper == name]
            parts = [
                kept_in(key, layers[key], before.get(key, {}), before_tokens)
                for key in keys
            ]
            found[name] = replace(
                together(parts),
                width=seen.width,
                expanded_per_token=seen.expanded,
                expanded_flops=seen.flops,
            )
        for name, first in self._alike.items():
            if name in ran:
                inside = f"{first}."
                found.update(
                    (name + key[len(first) :], value)
                    for key, value in list(found.items())
                    if key == first or key.startswith(inside)
                )
        return found
