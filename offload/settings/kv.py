"""The section `kv` of a policy."""

from typing import Literal

from pydantic import Field

from .values import AutoBytes, Bytes, Section


class KvPolicy(Section):
    """Where the keys and values of models that generate are kept, and in which
    dtype."""

    tier: Literal["auto", "device", "host", "disk"] = "auto"
    """Where the keys and values of growing attention layers are kept, append-only.
    `auto` leaves the cache as transformers makes it, on the device. When the tier is
    full, the next slower one is used, and that is announced. A cache that the caller
    passes to `generate` is not replaced."""
    limits: dict[Literal["device", "host", "disk"], Bytes] = Field(default_factory=dict)
    """Bytes that keys and values may take in each tier, from `tier` on; slower tiers
    are used when the first one is full. A tier that is not named may take half of what
    is free there when the model is loaded; on disk, all of it."""
    dtype: Literal["auto", "int8", "fp8"] = "auto"
    """What keys and values are stored as. `auto` is the dtype that the model computes
    with, so they are exact. `int8` and `fp8` store a byte for each element and a scale
    for each group of 32 elements of a head; this loses precision, which is
    announced."""
    attention: Literal["device", "host"] = "device"
    """Where attention runs for keys and values in the tier `host`, when a GPU computes.
    `host`: on the CPU, where they are. Then only queries and results cross the link, a
    few kilobytes for each token, instead of the keys and values of all earlier tokens;
    a prompt that comes in at once is still attended to on the GPU. Needs a model with
    transformers' `sdpa` attention (another one is announced and runs on the device),
    and `dtype: auto`."""
    staging_memory: AutoBytes = "auto"
    """Bytes of device memory into which keys and values are brought from a slower tier.
    `auto` is what three layers of a micro-batch take, or 256 MiB if that is more. The
    micro-batch that computes always gets room."""
