"""One model over many chips: the formulas of Efficiently Scaling Transformer Inference
(arXiv 2211.05102, sections 3 and 4), and the crossover of streaming. Pure.

T tokens, E hidden, F intermediate, n chips. A collective over a ring moves its bytes
once; what gathers weights moves weights, what keeps them where they are moves tokens.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chips:
    """A slice of equal chips."""

    num: int
    flops: float
    """Of one, at its peak."""
    memory_bytes: float
    memory_bandwidth: float
    network_bandwidth: float
    """Of one, over all its links."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """A transformer whose attention and MLP run side by side."""

    parameters: float
    layers: int
    hidden: int
    intermediate: int
    kv_heads: int
    head_size: int


@dataclass(frozen=True, slots=True)
class Shares:
    """How much of its peaks a slice reaches, and what a layer takes beside that.

    These were fitted by least squares to the eight latencies of the paper's tables 2
    and 3 (540B and 62B); a collective goes along one of a torus' three axes.
    """

    compute: float = 0.85
    memory: float = 0.88
    network: float = 0.256
    layer_seconds: float = 88e-6


def one_dimensional_bytes(tokens: float, hidden: int, itemsize: int) -> float:
    """Of a layer, weights stationary, split along F: independent of n."""
    return 2.0 * tokens * hidden * itemsize


def two_dimensional_bytes(
    tokens: float, hidden: int, intermediate: int, num: int, itemsize: int
) -> float:
    """The same, split along E and F at the best aspect: less from n > 4 F/E on."""
    return 4.0 * tokens * math.sqrt(hidden * intermediate / num) * itemsize


def gathered_bytes(
    tokens: float,
    hidden: int,
    intermediate: int,
    num: int,
    gathered_over: int,
    itemsize: int,
) -> float:
    """The same, weights gathered over `gathered_over` of the chips."""
    weights = 2.0 * hidden * intermediate * gathered_over / num
    return (weights + 2.0 * tokens * hidden / gathered_over) * itemsize


def best_gather(tokens: float, intermediate: int, num: int) -> float:
    """Chips to gather weights over, so that least is moved."""
    return math.sqrt(tokens * num / intermediate)


def layer_bytes(
    tokens: float, blocks: Blocks, num: int, itemsize: int = 2
) -> dict[str, float]:
    """Bytes that a chip moves for one layer, by layout."""
    hidden, wide = blocks.hidden, blocks.intermediate
    found = {
        "1d": one_dimensional_bytes(tokens, hidden, itemsize),
        "2d": two_dimensional_bytes(tokens, hidden, wide, num, itemsize),
    }
    for over in dict.fromkeys((4, 16, num)):
        if over <= num:
            found[f"gathered over {over}"] = gathered_bytes(
                tokens, hidden, wide, num, over, itemsize
            )
    return found


def pass_seconds(
    tokens: float,
    blocks: Blocks,
    chips: Chips,
    *,
    weight_itemsize: int = 2,
    context: float = 0.0,
    shares: Shares | None = None,
) -> float:
    """One pass of `tokens` in the layout that moves least; with a `context`, each of
    them reads so many keys and values, which are shared out by sequences."""
    shares = shares or Shares()
    compute = 2.0 * blocks.parameters * tokens / (chips.num * chips.flops)
    kv = tokens * context * blocks.layers * kv_bytes(blocks)
    read = (blocks.parameters * weight_itemsize + kv) / chips.num
    moved = blocks.layers * min(layer_bytes(tokens, blocks, chips.num).values())
    return (
        compute / shares.compute
        + read / chips.memory_bandwidth / shares.memory
        + moved / chips.network_bandwidth / shares.network
        + blocks.layers * shares.layer_seconds
    )


def kv_bytes(blocks: Blocks, itemsize: int = 2) -> float:
    """Of one token in one layer."""
    return 2.0 * blocks.kv_heads * blocks.head_size * itemsize


def max_context(
    blocks: Blocks, chips: Chips, batch: int, *, by_batch: bool, share: float = 0.3
) -> float:
    """Tokens of context for `batch` sequences with `share` of the memory for keys and
    values, which are shared out by sequences (`by_batch`) or by heads. A head that
    there are fewer of than chips stands on all of them."""
    if by_batch:
        each = kv_bytes(blocks) * batch / chips.num
    else:
        per_chip = math.ceil(blocks.kv_heads / chips.num) / blocks.kv_heads
        each = kv_bytes(blocks) * per_chip * batch
    return share * chips.memory_bytes / (each * blocks.layers)


def gather_crossover_tokens(
    layer_weight_bytes: float, hidden: int, itemsize: int
) -> float:
    """Tokens from which gathering a layer's weights moves less between GPUs than its
    tokens: T > W / (4 E bytes). Below it each keeps its share and tokens move."""
    return layer_weight_bytes / (4.0 * hidden * itemsize)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutCost:
    """A pass of one layout, as its formula has it: a floor, for peaks are never reached
    and attention, keys and values are left out."""

    name: str
    compute_seconds: float
    link_seconds: float = 0.0
    """Of each chip's own link, for weights that do not stay."""
    network_seconds: float
    moves_weights: bool
    """Between chips, ahead of who computes; or tokens, which computing waits for."""
    chip_bytes: float
    """Of weights that a chip holds at one time."""

    @property
    def pass_seconds(self) -> float:
        if self.moves_weights:
            return max(self.compute_seconds, self.link_seconds, self.network_seconds)
        return max(self.compute_seconds + self.network_seconds, self.link_seconds)


def layout_costs(
    tokens: float,
    blocks: Blocks,
    chips: Chips,
    *,
    link_bandwidth: float,
    itemsize: int,
) -> tuple[LayoutCost, ...]:
    """A pass of `tokens` over blocks whose attention and MLP follow each other, so that
    tokens move twice in each, whether weights stay on the chips or come over a link of
    `link_bandwidth` bytes a second each, of every layer a share."""
    weights = blocks.parameters * itemsize
    share = weights / chips.num
    each = 2.0 * blocks.parameters * tokens / (chips.num * chips.flops)
    keeps = max(each, share / chips.memory_bandwidth)
    network = chips.network_bandwidth / blocks.layers
    one = 2.0 * one_dimensional_bytes(tokens, blocks.hidden, itemsize) / network
    two = 2.0 * two_dimensional_bytes(
        tokens, blocks.hidden, blocks.intermediate, chips.num, itemsize
    )
    # Of a layer that computes and of the one that comes.
    at_a_time = 2.0 * weights / blocks.layers
    return (
        LayoutCost(
            name="gather-stream",
            compute_seconds=max(each, weights / chips.memory_bandwidth),
            link_seconds=share / link_bandwidth,
            network_seconds=weights / chips.network_bandwidth,
            moves_weights=True,
            chip_bytes=at_a_time,
        ),
        LayoutCost(
            name="TP-stream",
            compute_seconds=keeps,
            link_seconds=share / link_bandwidth,
            network_seconds=one,
            moves_weights=False,
            chip_bytes=at_a_time / chips.num,
        ),
        LayoutCost(
            name="weight-stationary 1D",
            compute_seconds=keeps,
            network_seconds=one,
            moves_weights=False,
            chip_bytes=share,
        ),
        LayoutCost(
            name="weight-stationary 2D",
            compute_seconds=keeps,
            network_seconds=two / network,
            moves_weights=False,
            chip_bytes=share,
        ),
    )
