"""Layers of transformers' caches whose keys and values a store keeps."""

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ...io.errors import UsageError
from ...io.kv.layer_buffer import KvLayerBuffer, Pair
from ...io.kv.shape import KvShape
from ...scheduler.kv.store import CacheHandle, Key, KvStore


class TieredLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Like DynamicLayer, but append-only: earlier tokens are not copied when new ones
    come.

    `capacity` is the number of tokens that will come. If it is None, there is room for
    those that come first. More tokens than that are possible, but earlier ones are
    copied then.
    """

    def __init__(
        self, store: KvStore, handle: CacheHandle, key: Key, capacity: int | None
    ) -> None:
        self._store = store
        self._handle = handle
        self._key = key
        self._capacity = capacity
        self._buffer: KvLayerBuffer | None = None
        DynamicLayer.__init__(self)  # type: ignore[no-untyped-call]

    @property
    def keys(self) -> torch.Tensor | None:
        """All keys, [batch, heads, tokens, dim], fetched from their tier; None before
        the first `update`."""
        return None if self._buffer is None else self._view()[0]

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        _refuse(value)

    @property
    def values(self) -> torch.Tensor | None:
        """All values, [batch, heads, tokens, dim]; see `keys`."""
        return None if self._buffer is None else self._view()[1]

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        _refuse(value)

    def lazy_initialization(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> None:
        """Makes room for keys and values, each [batch, heads, tokens, dim]."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._open(key_states, value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> Pair:
        """Appends keys and values, each [batch, heads, new tokens, dim].

        Returns the keys and values that attention sees, each [batch, heads, tokens,
        dim]. Raises UsageError if they record gradients, DoesNotFitError if no tier has
        room.
        """
        if torch.is_grad_enabled() and key_states.requires_grad:
            raise UsageError(
                "keys that record gradients cannot be kept in a tier: generate under "
                "torch.inference_mode(), or set kv.tier to auto"
            )
        buffer = self._open(key_states, value_states)
        self.is_initialized = True
        self.dtype, self.device = key_states.dtype, key_states.device
        self._store.touch(self._handle, self._key)
        return self._append(buffer, key_states, value_states)

    def get_seq_length(self) -> int:
        return 0 if self._buffer is None else self._buffer.length

    def reset(self) -> None:
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None
        self.is_initialized = False

    def offload(self) -> None:
        """Does nothing: the store decides which tier keeps the tokens."""

    def prefetch(self) -> None:
        if self._buffer is not None:
            self._buffer.prefetch()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Replaces sequence i by sequence `beam_idx[i]`; int64 [batch]."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the sequences `indices`: int64 [new batch], or bool [batch]."""
        if self._buffer is not None and self._buffer.length > 0:
            if indices.dtype == torch.bool:
                indices = indices.nonzero().squeeze(-1)
            self._buffer.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._buffer is not None:
            rows = torch.arange(self._buffer.shape.batch)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens.

        A positive number is the number of tokens to keep; transformers allowed that
        until 5.17.
        """
        length = self.get_seq_length()
        if self._buffer is not None:
            kept = tokens_to_remove
            kept = kept if kept > 0 else length + kept
            self._buffer.truncate(min(max(kept, 0), length))

    def _open(self, keys: torch.Tensor, values: torch.Tensor) -> KvLayerBuffer:
        if self._buffer is None:
            shape = KvShape.of(keys, values)
            capacity = self._needed(keys.shape[2])
            self._buffer = self._store.open(self._handle, self._key, shape, capacity)
        return self._buffer

    def _needed(self, num: int) -> int:
        """The number of tokens to make room for, when the first `num` come."""
        return max(num, self._capacity or 0, 1)

    def _append(
        self, buffer: KvLayerBuffer, keys: torch.Tensor, values: torch.Tensor
    ) -> Pair:
        return self._extended(buffer, keys, values, 0)

    def _extended(
        self,
        buffer: KvLayerBuffer,
        keys: torch.Tensor,
        values: torch.Tensor,
        start: int,
    ) -> Pair:
        is_first = buffer.length == 0
        pair = buffer.append(keys, values, start)
        if is_first and pair[0].device != keys.device:
            return keys, values  # these are all tokens, and they are here already
        return pair

    def _view(self) -> Pair:
        assert self._buffer is not None, "the first update opens it"
        self._store.touch(self._handle, self._key)
        return self._buffer.view(self._buffer.first)


class TieredSlidingLayer(  # type: ignore[no-untyped-call]
    TieredLayer, DynamicSlidingWindowLayer
):
    """Like DynamicSlidingWindowLayer: attention sees the last `sliding_window` - 1
    tokens and the new ones. Earlier tokens are dropped."""

    is_sliding = True

    def __init__(
        self,
        store: KvStore,
        handle: CacheHandle,
        key: Key,
        capacity: int | None,
        sliding_window: int,
    ) -> None:
        TieredLayer.__init__(self, store, handle, key, capacity)
        self.sliding_window = sliding_window
        self._sliding_window_tensor = torch.tensor(sliding_window, dtype=torch.long)
        self.record_past = False

    @property
    def cumulative_length(self) -> int:
        return self.get_seq_length()

    @cumulative_length.setter
    def cumulative_length(self, value: int) -> None:
        assert value == 0, "its length is the number of appended tokens"

    def crop(self, tokens_to_remove: int) -> None:
        if self._buffer is None:
            return
        if self._buffer.length < self.sliding_window:
            TieredLayer.crop(self, tokens_to_remove)
            return
        if not self.record_past and tokens_to_remove:
            raise UsageError(
                "what slid out of the window is forgotten: call "
                "activate_past_recording() on the cache before what is to be cropped"
            )
        TieredLayer.crop(self, min(tokens_to_remove, 0))
        self._slide(self._buffer)

    def _needed(self, num: int) -> int:
        """Room for twice the window, so that each token is moved at most once."""
        if self.record_past:
            return super()._needed(num)
        num = min(num, self.sliding_window)
        wanted = 2 * self.sliding_window
        return max(
            num, wanted if self._capacity is None else min(self._capacity, wanted)
        )

    def _append(
        self, buffer: KvLayerBuffer, keys: torch.Tensor, values: torch.Tensor
    ) -> Pair:
        kept = self.sliding_window - 1
        num = keys.shape[2]
        if buffer.length == 0 and 0 < kept < num and not self.record_past:
            buffer.skip(num - kept)
            buffer.append(keys[:, :, -kept:], values[:, :, -kept:], num - kept)
            return keys, values
        start = max(buffer.length - kept, buffer.first)
        pair = self._extended(buffer, keys, values, start)
        if not self.record_past:
            self._slide(buffer)
        return pair

    def _slide(self, buffer: KvLayerBuffer) -> None:
        buffer.forget(max(buffer.length - self.sliding_window + 1, buffer.first))


def _refuse(value: torch.Tensor | None) -> None:
    if value is not None:
        raise UsageError(
            "keys and values in a tier are appended to, not replaced: use update(), or "
            "set kv.tier to auto"
        )
