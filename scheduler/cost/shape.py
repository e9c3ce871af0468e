"""The FLOPs and bytes of a model, by site and by unit of weights. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True, slots=True)
class SiteCost:
    """What one site computes for a token. Sites that compute the same compare equal,
    whatever their names."""

    name: str = field(compare=False)
    flops_per_token: float = 0.0
    """Matrix products with weights; of experts, those expected to be active."""
    weight_bytes: float = 0.0
    """Bytes of its weights in the dtype of computing."""
    expert_flops_per_token: float = 0.0
    """Those of `flops_per_token` that are the experts' a token is sent to."""
    expert_weight_bytes: float = 0.0
    """Those of `weight_bytes` that are experts'."""
    expert_share: float = 1.0
    """The share (0 to 1) of the experts that a token is sent to."""
    num_modules: int = 0
    """Number of modules with weights of their own."""
    num_products: int = 0
    pointwise_per_token: float = 0.0
    """Elements touched by the operations between products."""
    attention_width: int = 0
    """Number of heads times head dimension; 0 without attention."""
    kv_per_token: int = 0
    """Elements of keys and values per token that tiers can keep."""
    own_kv_per_token: int = 0
    """Elements per token that stay on the device, in the model's own cache."""
    cross_kv_per_token: int = 0
    """Elements of keys and values per token of the encoder."""
    state_bytes: int = 0
    """Bytes that a sequence keeps on the device, whatever its length."""
    attention_window: int | None = None
    """The most tokens that a token attends to; None: all before it."""
    expanded_per_token: int = 0
    """Elements of temporary keys and values for each kept token, in each call."""
    expanded_flops: float = 0.0
    """FLOPs in which these are made of latents, for each kept token in each call."""
    vocabulary: int = 0
    """Number of logits of a head; 0 for other sites. Scoring computes a head in chunks,
    generating only for the last token."""
    makes_hidden: bool = True
    """Whether embedding runs it: it is neither a head nor the decoder behind an
    encoder."""
    runs_for_text: bool = True
    """Whether a text without images or sounds runs through it, and loads it."""

    def context(self, length: float) -> float:
        """How many of the `length` tokens before it a token attends to."""
        window = self.attention_window
        return length if window is None else min(length, window)

    def kept_tokens(self, length: int, *, is_stored: bool = False) -> int:
        """For how many of `length` tokens there is room in the cache: of a window, one
        less than its tokens. A store (`is_stored`) has room for twice the window."""
        if self.attention_window is None:
            return length
        window = self.attention_window
        return min(length, 2 * window if is_stored else window - 1)

    def hit_share(self, num_tokens: float) -> float:
        """The share of the experts that at least one of `num_tokens` is sent to, if all
        are as likely."""
        return float(1.0 - (1.0 - self.expert_share) ** num_tokens)


@dataclass(frozen=True, slots=True)
class UnitCost:
    """The bytes of loading one unit of weights."""

    name: str
    sites: tuple[int, ...]
    stored_bytes: int
    """Bytes read from the checkpoint."""
    nbytes: int
    """Bytes of its slot."""
    decoded: tuple[tuple[str, int], ...] = ()
    """The codecs that decode it on the CPU while it is loaded, each with the stored
    bytes that it takes; `cast` also assembles."""
    is_resident: bool = False


@dataclass(frozen=True)
class ModelShape:
    """A model as the cost model sees it."""

    sites: tuple[SiteCost, ...]
    units: tuple[UnitCost, ...]
    itemsize: int
    """Bytes of an element in the dtype of computing."""
    hidden: int
    gathers_rows: bool = False
    """Whether embedding rows are read from the file, one by one."""
    vocabulary: int = 0
    prompts_in_parts: bool = True
    """Whether a prompt may be computed in several calls."""
    state_bytes: int = 0
    """Bytes that a sequence keeps on the device, beside those of sites."""
    note: str = ""
    """What is to be said of how keys and values were found; "" if nothing."""

    @property
    def has_experts(self) -> bool:
        return any(site.expert_share < 1.0 for site in self.sites)

    @cached_property
    def streamed(self) -> tuple[int, ...]:
        """The units that do not have to stay on the device."""
        return tuple(
            index
            for index, unit in enumerate(self.units)
            if unit.sites and not unit.is_resident
        )

    @cached_property
    def resident_bytes(self) -> int:
        return sum(unit.nbytes for unit in self.units if unit.is_resident)

    @cached_property
    def streamed_bytes(self) -> int:
        return sum(self.units[index].nbytes for index in self.streamed)

    @cached_property
    def largest_bytes(self) -> int:
        """The most bytes of slots that one site needs at once."""
        by_site = [0] * len(self.sites)
        for unit in self.units:
            for site in unit.sites:
                by_site[site] += unit.nbytes
        return max(by_site, default=0)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that a token adds to caches, while no window is full."""
        kept = (site.kv_per_token + site.own_kv_per_token for site in self.sites)
        return self.itemsize * sum(kept)

    @property
    def flops_per_token(self) -> float:
        return sum(site.flops_per_token for site in self.sites)

    def units_of(self, site: int) -> list[int]:
        return [i for i, unit in enumerate(self.units) if site in unit.sites]


@dataclass(frozen=True, slots=True)
class MicroBatchShape:
    """A micro-batch of `rows`, all padded to `length` tokens."""

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True, slots=True)
class Settings:
    """The part of a policy on which the cost depends."""

    placement: tuple[str, ...]
    """The tier of each unit."""
    capacity_bytes: int
    """Bytes of the working set."""
    lookahead: int
    logits_bytes: int
    kept_bytes: tuple[int, ...] | None = None
    """Bytes of each unit in memory, if tiers there keep what is stored and decode it
    whenever it is loaded; None if they keep what is in slots."""
    kv_tier: str = "auto"
    kv_itemsize: float | None = None
    """Bytes of a stored element of keys and values, scales included; None: as in
    computing."""
    is_coalesced: bool = False
    activations_move: bool = False
    stops_at_hidden: bool = False
    """Whether only sites with `makes_hidden` run and are loaded."""

    def kept_of(self, unit: int) -> int | None:
        """Bytes of `unit` in memory, if it is kept there as it is stored; else None."""
        return None if self.kept_bytes is None else self.kept_bytes[unit]


def split_rows(num_rows: int, each: int, length: int) -> list[MicroBatchShape]:
    """Splits `num_rows` rows into micro-batches of `each`; the last may be smaller."""
    full, rest = divmod(num_rows, max(1, each))
    micro_batches = [MicroBatchShape(max(1, each), length)] * full
    return [*micro_batches, MicroBatchShape(rest, length)] if rest else micro_batches


def total_tokens(batches: Sequence[MicroBatchShape]) -> int:
    return sum(batch.tokens for batch in batches)
