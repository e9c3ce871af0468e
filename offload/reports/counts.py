"""What a job has counted, and what is said of it. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a job has counted, and what it was asked for."""

    seconds: float
    compute_seconds: float
    wait_seconds: Mapping[str, float]
    """Computing stood still for weights of this tier."""
    kv_wait_seconds: float
    """The part of `compute_seconds` spent waiting for keys and values."""
    kv_bytes: Mapping[str, int]
    """Most bytes of keys and values at one time, by the tier that kept them."""
    has_lossy_kv: bool
    tokens: int
    tokens_padding: int
    rows: int
    micro_batches: int
    max_in_flight: int
    """Micro-batches that were under way at one time, at most,"""
    width: int
    """and that the policy lets in."""
    is_generating: bool
    in_flight: int
    """tokens_in_flight or, when generating, sequences_in_flight."""
    micro_batch: int
    """micro_batch_tokens or, when generating, micro_batch_sequences."""
    rows_per_product: float
    """Mean rows of a matrix product: a token each."""
    is_coalesced: bool
    is_compiled: bool
    has_slow_dtype: bool
    """The processor has no instructions for the dtype that it computes in."""
    streamed_bytes: int
    """That come over the link in each pass."""
    host_memory: int
    """Bytes of weights that stay in it already."""
    free_host_bytes: int
    taken_elsewhere: float = 0.0
    """The share of its threads' CPU time that other work on the machine had."""

    @property
    def work(self) -> int:
        """All that could be in flight at one time: tokens or, when generating, rows."""
        return self.rows if self.is_generating else self.tokens


@dataclass(frozen=True, slots=True)
class Advice:
    """One thing to change."""

    setting: str | None
    """As a line of a policy file; None where no setting does it."""
    effect: str


@dataclass(frozen=True, slots=True)
class Bound:
    """What bound a run."""

    by: str
    """`compute`; the tier waited for (`disk`, `host`, `peer`); `kv` (keys and values
    were waited for); `rows` (too few of them), `activations` (no room for more of them
    in flight), `padding`, `width` (of the products), `busy` (the machine, with
    other work), `overhead` (what is neither computing nor waiting for weights)."""
    share: float
    """Of the time (of `padding`: of the positions computed)."""
    why: str
    """One sentence."""
    advice: tuple[Advice, ...]
