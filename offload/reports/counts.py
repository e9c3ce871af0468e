"""What a job has counted, and what is said about it. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a job has counted, and what it was asked for. Times are in seconds."""

    seconds: float
    compute_seconds: float
    wait_seconds: Mapping[str, float]
    """How long computing waited for weights, by tier."""
    kv_wait_seconds: float
    """The part of `compute_seconds` that was spent waiting for keys and values."""
    kv_bytes: Mapping[str, int]
    """The most bytes of keys and values at one time, by the tier that kept them."""
    has_lossy_kv: bool
    tokens: int
    tokens_padding: int
    rows: int
    micro_batches: int
    max_in_flight: int
    """The most micro-batches that were in flight at one time."""
    width: int
    """How many micro-batches the policy allows in flight."""
    is_generating: bool
    in_flight: int
    """The policy's tokens_in_flight or, in generation, sequences_in_flight."""
    micro_batch: int
    """The policy's micro_batch_tokens or, in generation, micro_batch_sequences."""
    rows_per_product: float
    """The mean number of rows (tokens) of a matrix product."""
    is_coalesced: bool
    is_compiled: bool
    has_slow_dtype: bool
    """Whether the processor has no instructions for the dtype that it computes in."""
    streamed_bytes: int
    """Bytes of weights that are read in each pass."""
    host_memory: int
    """Bytes of weights that already stay in host memory."""
    free_host_bytes: int
    rank_wait_seconds: float = 0.0
    """How long this process, the first rank, waited for other ranks."""
    others_wait_seconds: float = 0.0
    """How long another rank waited for its weights, at most."""
    taken_elsewhere: float = 0.0
    """The share (0 to 1) of its threads' CPU time that other work on the machine
    took."""

    @property
    def work(self) -> int:
        """The most that could be in flight at one time: all tokens or, in generation,
        all rows."""
        return self.rows if self.is_generating else self.tokens


@dataclass(frozen=True, slots=True)
class Advice:
    """One thing to change."""

    setting: str | None
    """A line of a policy file; None if no setting does it."""
    effect: str


@dataclass(frozen=True, slots=True)
class Bound:
    """What bound a run, and what to change."""

    by: str
    """`compute`; the tier that was waited for (`disk`, `host`, `peer`); `kv` (waiting
    for keys and values); `ranks` (waiting for other ranks); `rows` (too few of them);
    `activations` (no room for more in flight); `padding`; `width` (narrow matrix
    products); `busy` (other work on the machine); `overhead` (time in which the job
    neither computed nor waited for weights)."""
    share: float
    """The share (0 to 1) of the time; for `padding`, of the computed positions."""
    why: str
    """One sentence."""
    advice: tuple[Advice, ...]
