"""What the user asks for of the keys and values of models that generate."""

from typing import Literal

from pydantic import Field

from .section import Section
from .values import AutoBytes, Bytes


class KvPolicy(Section):
    """Where they are kept, and as what."""

    tier: Literal["auto", "device", "host", "disk"] = "auto"
    """Where the keys and values of growing attention layers are kept, append-only.
    `auto` leaves the cache as transformers makes it, on the device. What has no room
    goes to the next slower tier, announced. In place of a cache that the caller passes
    to `generate` nothing is put."""
    limits: dict[Literal["device", "host", "disk"], Bytes] = Field(default_factory=dict)
    """Bytes that they may take in each tier, from `tier` on; the slower ones are used
    when the first one is full. A tier that is not named: half of what is free there
    when the model is loaded; on disk all of it."""
    dtype: Literal["auto", "int8", "fp8"] = "auto"
    """What they are kept as: `auto` is what the model computes with, bit for bit.
    `int8` and `fp8` keep a scale for each group of 32 elements of a head and lose the
    rest; which is announced."""
    attention: Literal["device", "host"] = "device"
    """Where those in the tier `host` are attended to, when a GPU computes. `host`: by
    the CPU, where they are, so that only queries and results cross the link, a few
    kilobytes for each token instead of all that came before it; a prompt that comes in
    at once is attended to on the GPU. Needs a model with transformers' `sdpa` attention
    (what has another is announced), and `dtype: auto`."""
    staging_memory: AutoBytes = "auto"
    """Bytes of the device's memory that they pass through on their way from a slower
    tier. `auto` is what three layers of a micro-batch take, or 256 MiB if that is
    more; what computes always has room."""
