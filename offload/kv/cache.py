"""Puts the layers of a store into the caches that transformers makes for `generate`.

Only this file depends on how transformers makes them; a contract test watches that.
"""

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from ...scheduler.kv.store import CacheHandle, KvStore
from .layers import TieredLayer, TieredSlidingLayer

_PREPARE = "_prepare_cache_for_generation"
_NAMES = ("past_key_values", "cache_params")
_STATELESS = ("DummyLayer",)


def install(model: nn.Module, store: KvStore) -> Callable[[], None]:
    """Makes `model.generate` keep its keys and values in `store`, except in a cache
    that the caller passes.

    Returns a function that undoes this.
    """
    prepare = getattr(model, _PREPARE, None)
    if prepare is None:
        return lambda: None

    def prepare_cache(
        generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        given = {name: model_kwargs.get(name) for name in _NAMES}
        result = prepare(generation_config, model_kwargs, *args, **kwargs)
        if getattr(generation_config, "is_assistant", False):
            return result  # an assistant's cache is cropped all the time
        longest = kwargs.get("max_cache_length", args[2] if len(args) > 2 else None)
        for name in _NAMES:
            cache = model_kwargs.get(name)
            if cache is not None and cache is not given[name]:
                replace_layers(cache, store, longest)
        return result

    model.__dict__[_PREPARE] = prepare_cache

    # The function that undoes it must not keep the model alive, nor anything that
    # refers to it.
    weak, ours = weakref.ref(model), weakref.ref(prepare_cache)

    def undo() -> None:
        there = weak()
        if there is not None and there.__dict__.get(_PREPARE) is ours():
            del there.__dict__[_PREPARE]

    return undo


def replace_layers(cache: Cache, store: KvStore, capacity: int | None) -> None:
    """Replaces the layers of `cache` that grow with each token by layers of `store`.

    Other layers stay as they are, and that is noted. `capacity` is the number of tokens
    that will come, or None if it is not known.
    """
    handle = store.begin()
    if isinstance(cache, EncoderDecoderCache):
        _replace(cache.self_attention_cache, store, handle, "self", capacity)
        _replace(cache.cross_attention_cache, store, handle, "cross", None)
    else:
        _replace(cache, store, handle, "self", capacity)


def _replace(
    cache: Cache, store: KvStore, handle: CacheHandle, part: str, capacity: int | None
) -> None:
    if type(cache) is not DynamicCache or cache.offloading:
        store.fallbacks.announce(
            f"kv: a {type(cache).__name__} stays as transformers made it"
        )
        return
    for index, layer in enumerate(cache.layers):
        key = (part, index)
        if type(layer) is DynamicLayer:
            cache.layers[index] = TieredLayer(store, handle, key, capacity)
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[index] = TieredSlidingLayer(
                store, handle, key, capacity, layer.sliding_window
            )
        elif type(layer).__name__ not in _STATELESS:
            kind = type(layer).__name__
            store.fallbacks.announce(f"kv: what {kind} keeps stays on the device")
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = _numbered(cache, store, handle, part, capacity)


def _numbered(
    cache: Cache, store: KvStore, handle: CacheHandle, part: str, capacity: int | None
) -> Any:
    """Returns a function that makes the next layer of `cache`, which appends its layers
    when they are needed."""
    layers = cache.layers
    return lambda: TieredLayer(store, handle, (part, len(layers)), capacity)
