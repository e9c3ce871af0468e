"""What a job keeps in memory beside its weights. Pure."""

from dataclasses import dataclass

from .shape import ModelShape

RUNTIME_BYTES = 500 << 20
"""Python, torch and transformers with their heaps (measured on the 3B model of the
log: 579 MiB beside the working set, activations among them)."""
_HELD_PER_TOKEN = 3
"""Hidden states of one suspended token: its own, a residual, and what is allocated
anew while the old one still lives."""
_ROW_BYTES = 64 << 10
"""A row's stack, frames and masks."""


_WITH_IT = 3
"""Micro-batches that the device holds where those that wait are in host memory: the one
that computes, the one before it and the one after it (as in `activation_offload`)."""
STAGED_STRIPS, STAGED_BYTES = 3, 256 << 20
"""Layers of a micro-batch that keys and values from a slower tier have room for at
least, and bytes that there is room for at least (`FEW_STRIPS`, `FEW_BYTES` of
`kv_staging`), each with an eighth more, since they grow."""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes, by what they are for."""

    activations: int
    """Of who is in flight and of the one that computes, in the device's memory."""
    kv: int
    """Wherever they are kept."""
    waiting: int = 0
    """Activations that have moved to host memory."""
    staging: int = 0
    """Of the device's memory, that keys and values from elsewhere come into."""
    pending: int = 0
    """Of host memory, for keys and values on their way to disk."""

    def beside_weights(self, kv_tier: str, *, is_shared: bool) -> tuple[int, int]:
        """(device, host): what weights leave room for, with keys and values in
        `kv_tier`. `is_shared`: the device's memory is the host's, and all is there."""
        device, host = self.activations + self.staging, self.waiting + self.pending
        if kv_tier == "host":
            host += self.kv
        elif kv_tier != "disk":
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
    """Of scoring so many tokens at a time; `waits_on_host`: what waits is moved out."""
    each = shape.hidden * shape.itemsize * _HELD_PER_TOKEN
    there, waiting = tokens_in_flight, 0
    if waits_on_host:
        there = min(there, _WITH_IT * micro_batch_tokens)
        waiting = tokens_in_flight * each
    workspace = _workspace(shape, micro_batch_tokens)
    return Need(there * each + logits + workspace, 0, waiting)


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
) -> Need:
    """Of completing so many sequences at a time, `each` in a micro-batch, of whose
    prompts `chunk_tokens` (None: all) come in with one pass. Keys and values have
    elements of `kv_itemsize` bytes (None: of what it computes with) and are brought to
    where they are attended to (`is_staged`), through `staging_bytes` there (None: as
    many as are taken unless somebody says how many)."""
    chunk = min(chunk_tokens or prompt_tokens, prompt_tokens)
    held = sequences * chunk * shape.hidden * shape.itemsize
    held += sequences * _ROW_BYTES + sequences * shape.vocabulary * 4
    scale = 1.0 if kv_itemsize is None else kv_itemsize / shape.itemsize
    length = prompt_tokens + new_tokens
    kv = int(sequences * length * shape.kv_bytes_per_token * scale)
    staging = 0
    if is_staged:
        widest = max((site.kv_per_token for site in shape.sites), default=0)
        strip = each * length * widest * shape.itemsize * scale * 9 / 8
        most = STAGED_BYTES if staging_bytes is None else staging_bytes
        least = STAGED_STRIPS if staging_bytes is None else 1
        staging = int(max(least * strip, min(sequences / each * strip, most)))
    workspace = _workspace(shape, each * chunk)
    return Need(held + workspace, kv, 0, staging, pending)


def _workspace(shape: ModelShape, tokens: int) -> int:
    """Of the block that computes: what its operations touch exists for a while, at
    most about half of it at one time."""
    touched = max((site.pointwise_per_token for site in shape.sites), default=0.0)
    return int(tokens * touched * shape.itemsize / 4)
