"""The memory that a job needs beside its weights. Pure."""

from dataclasses import dataclass

from ...io.tier import Tier
from .shape import ModelShape

RUNTIME_BYTES = 500 << 20
"""Python, torch and transformers with their heaps. Measured with the 3B model of
bench/LOG.md: 579 MiB beside the working set, activations included."""
_HELD_PER_TOKEN = 3
"""Hidden states kept for one token of a suspended micro-batch: the current one, a
residual, and a new one that is allocated before the old one is freed."""
_ROW_BYTES = 64 << 10
"""The stack, frames and masks of one row."""


_WITH_IT = 3
"""Micro-batches whose activations are on the device while those of the others are in
host memory: the one that computes, the one before and the one after it (see
`activation_offload`)."""
STAGED_LAYERS, STAGED_BYTES = 3, 256 << 20
"""The least size of the staging buffer for keys and values from a slower tier: this
many layers of a micro-batch, and this many bytes (`FEW_LAYERS` and `FEW_BYTES` in
io/kv/staging.py). An eighth is added to each, since caches grow."""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of memory that a job needs, by purpose."""

    activations: int
    """Device memory: activations of all micro-batches in flight on the device, and the
    workspace of the one that computes."""
    kv: int
    """Keys and values, in whichever tier keeps them."""
    waiting: int = 0
    """Host memory: activations that were moved out of the device."""
    staging: int = 0
    """Device memory: the buffer into which keys and values are loaded."""
    pending: int = 0
    """Host memory: keys and values that are being written to disk."""
    states: int = 0
    """Device memory: states of layers, and keys and values that no tier can keep."""

    def beside_weights(self, kv_tier: str, *, is_shared: bool) -> tuple[int, int]:
        """(device, host): the bytes that are not available for weights if keys and
        values are in `kv_tier`. `is_shared`: the device is the CPU, so that all bytes
        are in one memory."""
        device = self.activations + self.staging + self.states
        host = self.waiting + self.pending
        if kv_tier == Tier.HOST:
            host += self.kv
        elif kv_tier != Tier.DISK:
            device += self.kv
        return (device + host, 0) if is_shared else (device, host)


def scoring_need(
    shape: ModelShape,
    tokens_in_flight: int,
    micro_batch_tokens: int,
    logits: int,
    *,
    waits_on_host: bool = False,
) -> Need:
    """The need of scoring `tokens_in_flight` at a time; logits take `logits` bytes.
    `waits_on_host`: suspended micro-batches are moved to host memory."""
    each = shape.hidden * shape.itemsize * _HELD_PER_TOKEN
    there, waiting = tokens_in_flight, 0
    if waits_on_host:
        there = min(there, _WITH_IT * micro_batch_tokens)
        waiting = tokens_in_flight * each
    workspace = _workspace(shape, micro_batch_tokens)
    return Need(there * each + logits + workspace, 0, waiting)


@dataclass(frozen=True, slots=True)
class CacheBytes:
    """Bytes that sequences keep from one pass to the next."""

    kv: int
    """Keys and values that tiers can keep."""
    states: int
    """States of layers, and keys and values of other kinds: they stay on the device."""

    @property
    def total(self) -> int:
        return self.kv + self.states


def cache_bytes(
    shape: ModelShape,
    sequences: int,
    prompt_tokens: int,
    new_tokens: int,
    *,
    kv_itemsize: float | None = None,
    is_stored: bool = False,
) -> CacheBytes:
    """What `sequences` of `prompt_tokens` and `new_tokens` keep at their end. With an
    encoder, the prompt is what that has. See `generating_need` for the others."""
    has_encoder = any(site.cross_kv_per_token for site in shape.sites)
    length = new_tokens if has_encoder else prompt_tokens + new_tokens
    kept = crossing = own = states = 0
    for site in shape.sites:
        tokens = site.kept_tokens(length, is_stored=is_stored)
        kept += site.kv_per_token * tokens
        own += site.own_kv_per_token * site.kept_tokens(length)
        crossing += site.cross_kv_per_token * prompt_tokens
        states += site.state_bytes
    each = shape.itemsize if kv_itemsize is None else kv_itemsize
    states += shape.state_bytes + own * shape.itemsize
    return CacheBytes(int(sequences * (kept + crossing) * each), sequences * states)


def generating_need(
    shape: ModelShape,
    sequences: int,
    prompt_tokens: int,
    new_tokens: int,
    each: int,
    *,
    chunk_tokens: int | None = None,
    kv_itemsize: float | None = None,
    is_staged: bool = False,
    staging_bytes: int | None = None,
    pending: int = 0,
    is_stored: bool = False,
) -> Need:
    """The need of generating for `sequences` at a time, `each` of them a micro-batch.

    One pass computes `chunk_tokens` of each prompt (None: all). An element of keys and
    values takes `kv_itemsize` bytes (None: as many as in computing). `is_staged`: keys
    and values are loaded into a buffer of `staging_bytes` before attention reads them
    (None: the default size). `is_stored`: a store keeps them, and not transformers."""
    chunk = min(chunk_tokens or prompt_tokens, prompt_tokens)
    held = sequences * chunk * shape.hidden * shape.itemsize
    held += sequences * _ROW_BYTES + sequences * shape.vocabulary * 4
    length = prompt_tokens + new_tokens
    cached = cache_bytes(
        shape,
        sequences,
        prompt_tokens,
        new_tokens,
        kv_itemsize=kv_itemsize,
        is_stored=is_stored,
    )
    staging = 0
    if is_staged:
        widest = max(
            (
                site.kv_per_token * site.kept_tokens(length, is_stored=True)
                for site in shape.sites
            ),
            default=0,
        )
        layer = each * widest * (kv_itemsize or shape.itemsize) * 9 / 8
        most = STAGED_BYTES if staging_bytes is None else staging_bytes
        least = STAGED_LAYERS if staging_bytes is None else 1
        staging = int(max(least * layer, min(sequences / each * layer, most)))
    workspace = _workspace(shape, each * chunk, rows=each, length=length)
    return Need(held + workspace, cached.kv, 0, staging, pending, cached.states)


def _workspace(shape: ModelShape, tokens: int, rows: int = 0, length: int = 0) -> int:
    """Bytes of temporaries in the block that computes `tokens`: about half of what its
    operations touch exists at one time. Beside them, there are the keys and values that
    are made for all `length` tokens of `rows` sequences, of latents or for more
    heads."""
    each = (
        tokens * site.pointwise_per_token / 4
        + rows * site.kept_tokens(length) * site.expanded_per_token
        for site in shape.sites
    )
    return int(max(each, default=0.0) * shape.itemsize)
