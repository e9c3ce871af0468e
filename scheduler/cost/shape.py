"""What a model asks of a machine: the FLOPs and bytes of its sites and units. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class SiteCost:
    """What one site computes for a token. Sites that compute the same are equal,
    whatever their names."""

    name: str = field(compare=False)
    flops_per_token: float = 0.0
    """Of products with weights, of the experts that are expected to be active."""
    weight_bytes: float = 0.0
    """Of its weights as they are computed with."""
    num_modules: int = 0
    """With weights of their own."""
    num_products: int = 0
    pointwise_per_token: float = 0.0
    """Elements that operations between the products touch."""
    attention_width: int = 0
    """Heads times their dimension; 0 without attention."""
    kv_per_token: int = 0
    """Elements of keys and values that a token adds."""
    attention_window: int | None = None
    """Most tokens that one attends to; None: all before it."""
    vocabulary: int = 0
    """Of a head, which scoring runs in chunks and generating for the last token only;
    0 for other sites."""
    makes_hidden: bool = True
    """Whether it is in the part of the model that embeds: no head, no decoder behind an
    encoder."""

    def context(self, length: float) -> float:
        """Tokens attended to, of `length`."""
        window = self.attention_window
        return length if window is None else min(length, window)


@dataclass(frozen=True, slots=True)
class UnitCost:
    """What loading one unit moves."""

    name: str
    sites: tuple[int, ...]
    stored_bytes: int
    """Read from the checkpoint."""
    nbytes: int
    """Of its slot."""
    cast_bytes: int = 0
    """Stored bytes that are cast or assembled on the way in."""
    is_resident: bool = False


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model as the cost model sees it."""

    sites: tuple[SiteCost, ...]
    units: tuple[UnitCost, ...]
    itemsize: int
    """Bytes of an element of what it computes with."""
    hidden: int
    gathers_rows: bool = False
    """Whether the embedding's rows are read from its file."""
    vocabulary: int = 0
    prompts_in_parts: bool = True
    """Whether a prompt may come in with several calls."""

    @property
    def streamed(self) -> tuple[int, ...]:
        """The units that can be elsewhere than on the device."""
        return tuple(
            index
            for index, unit in enumerate(self.units)
            if unit.sites and not unit.is_resident
        )

    @property
    def resident_bytes(self) -> int:
        return sum(unit.nbytes for unit in self.units if unit.is_resident)

    @property
    def streamed_bytes(self) -> int:
        return sum(self.units[index].nbytes for index in self.streamed)

    @property
    def largest_bytes(self) -> int:
        """Of slots that one site needs at once."""
        by_site = [0] * len(self.sites)
        for unit in self.units:
            for site in unit.sites:
                by_site[site] += unit.nbytes
        return max(by_site, default=0)

    @property
    def kv_bytes_per_token(self) -> int:
        return self.itemsize * sum(site.kv_per_token for site in self.sites)

    @property
    def flops_per_token(self) -> float:
        return sum(site.flops_per_token for site in self.sites)

    def units_of(self, site: int) -> list[int]:
        return [i for i, unit in enumerate(self.units) if site in unit.sites]


@dataclass(frozen=True, slots=True)
class MicroBatchShape:
    """Rows of one length, or padded to it."""

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True, slots=True)
class Settings:
    """What of a policy the cost depends on."""

    placement: tuple[str, ...]
    """The tier of each unit."""
    capacity_bytes: int
    """Of the working set."""
    lookahead: int
    logits_bytes: int
    kv_tier: str = "auto"
    kv_itemsize: float | None = None
    """Bytes of an element of keys and values as they are kept, scales counted; None: of
    what it computes with."""
    is_coalesced: bool = False
    activations_move: bool = False
    stops_at_hidden: bool = False
    """Whether only what makes hidden states runs, and is loaded."""


def split_rows(num_rows: int, each: int, length: int) -> list[MicroBatchShape]:
    """`num_rows` rows in micro-batches of `each`, the rest in a smaller one."""
    full, rest = divmod(num_rows, max(1, each))
    found = [MicroBatchShape(max(1, each), length)] * full
    return [*found, MicroBatchShape(rest, length)] if rest else found


def total_tokens(batches: Sequence[MicroBatchShape]) -> int:
    return sum(batch.tokens for batch in batches)
