"""One model over many chips: the formulas of Efficiently Scaling Transformer Inference
(arXiv 2211.05102, sections 3 and 4), and the crossover of streaming. Pure.

T tokens, E hidden size, F intermediate size, n chips. A ring collective moves its bytes
once. Layouts that gather weights move weights; stationary layouts move activations.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chips:
    """A slice of `num` equal chips. Bandwidths are in bytes per second."""

    num: int
    flops: float
    """Peak FLOP/s of one chip."""
    memory_bytes: float
    memory_bandwidth: float
    network_bandwidth: float
    """One chip's bandwidth over all its links together."""


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
    """The fraction of each peak that a slice reaches, and the overhead of a layer.

    Fitted by least squares to the eight latencies of the paper's tables 2 and 3 (540B
    and 62B). A collective uses one of the three axes of a torus.
    """

    compute: float = 0.85
    memory: float = 0.88
    network: float = 0.256
    layer_seconds: float = 88e-6


def one_dimensional_bytes(tokens: float, hidden: int, itemsize: int) -> float:
    """Bytes that a chip moves for one layer; stationary weights, split along F. They do
    not depend on n."""
    return 2.0 * tokens * hidden * itemsize


def two_dimensional_bytes(
    tokens: float, hidden: int, intermediate: int, num: int, itemsize: int
) -> float:
    """Bytes that a chip moves for one layer; stationary weights, split along E and F in
    the best ratio. Fewer than `one_dimensional_bytes` if n > 4 F/E."""
    return 4.0 * tokens * math.sqrt(hidden * intermediate / num) * itemsize


def gathered_bytes(
    tokens: float,
    hidden: int,
    intermediate: int,
    num: int,
    gathered_over: int,
    itemsize: int,
) -> float:
    """Bytes that a chip moves for one layer; weights gathered over `gathered_over` of
    the chips."""
    weights = 2.0 * hidden * intermediate * gathered_over / num
    return (weights + 2.0 * tokens * hidden / gathered_over) * itemsize


def best_gather(tokens: float, intermediate: int, num: int) -> float:
    """The number of chips to gather weights over that moves the fewest bytes."""
    return math.sqrt(tokens * num / intermediate)


def layer_bytes(
    tokens: float, blocks: Blocks, num: int, itemsize: int = 2
) -> dict[str, float]:
    """Bytes that a chip moves for one layer, by name of the layout."""
    hidden, wide = blocks.hidden, blocks.intermediate
    by_layout = {
        "1d": one_dimensional_bytes(tokens, hidden, itemsize),
        "2d": two_dimensional_bytes(tokens, hidden, wide, num, itemsize),
    }
    for over in dict.fromkeys((4, 16, num)):
        if over <= num:
            by_layout[f"gathered over {over}"] = gathered_bytes(
                tokens, hidden, wide, num, over, itemsize
            )
    return by_layout


def pass_seconds(
    tokens: float,
    blocks: Blocks,
    chips: Chips,
    *,
    weight_itemsize: int = 2,
    context: float = 0.0,
    shares: Shares | None = None,
) -> float:
    """Seconds of one pass of `tokens` in the layout that moves the fewest bytes. Each
    token attends to `context` tokens, whose keys and values are split by sequence."""
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
    """Bytes of keys and values of one token in one layer."""
    return 2.0 * blocks.kv_heads * blocks.head_size * itemsize


def max_context(
    blocks: Blocks, chips: Chips, batch: int, *, by_batch: bool, share: float = 0.3
) -> float:
    """The longest context, in tokens, for `batch` sequences if `share` of the memory
    holds keys and values. They are split over chips by sequence (`by_batch`) or by
    head; if there are fewer heads than chips, heads are replicated."""
    if by_batch:
        each = kv_bytes(blocks) * batch / chips.num
    else:
        per_chip = math.ceil(blocks.kv_heads / chips.num) / blocks.kv_heads
        each = kv_bytes(blocks) * per_chip * batch
    return share * chips.memory_bytes / (each * blocks.layers)


def gather_crossover_tokens(
    layer_weight_bytes: float, hidden: int, itemsize: int
) -> float:
    """The number of tokens T above which gathering a layer's weights between GPUs moves
    fewer bytes than moving its activations: T > W / (4 E itemsize), for weights of W
    bytes."""
    return layer_weight_bytes / (4.0 * hidden * itemsize)


def output_crossover_tokens(weight_bytes: float, bytes_per_token: float) -> float:
    """As `gather_crossover_tokens`, for ranks that put together the outputs of all
    products instead (`ranks: tensor`): T > W / B, for weights of W bytes and outputs of
    B bytes a token. Of both, each rank gets (n - 1)/n."""
    return weight_bytes / bytes_per_token


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutCost:
    """The time of a pass in one layout by its formula. It is a lower bound: peak rates
    are assumed, and attention, keys and values are left out."""

    name: str
    compute_seconds: float
    link_seconds: float = 0.0
    """Time on each chip's own link, over which streamed weights come."""
    network_seconds: float
    moves_weights: bool
    """Whether weights move between chips, while others compute; else activations move,
    and computing waits for them."""
    chip_bytes: float
    """Bytes of weights that a chip holds at one time."""

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
    """The cost of a pass of `tokens` in each layout. Attention and MLP of a block run
    one after the other, so activations move twice per block. Each chip has a link of
    `link_bandwidth` bytes per second for its share of streamed weights."""
    weights = blocks.parameters * itemsize
    share = weights / chips.num
    each = 2.0 * blocks.parameters * tokens / (chips.num * chips.flops)
    keeps = max(each, share / chips.memory_bandwidth)
    network = chips.network_bandwidth / blocks.layers
    one = 2.0 * one_dimensional_bytes(tokens, blocks.hidden, itemsize) / network
    two = 2.0 * two_dimensional_bytes(
        tokens, blocks.hidden, blocks.intermediate, chips.num, itemsize
    )
    # The layer that computes and the one that is being loaded.
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
