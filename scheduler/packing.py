"""Packs rows of different lengths into micro-batches of similar lengths, and says how
many rows a matrix product should have. Pure."""

from collections.abc import Sequence

# Measured, float32, 2048 x 5632, two cores: 22 GFLOP/s at 4 rows, 29 at 8, 49 at 16, 81
# at 32, 116 at 64, 168 at 128, 200 at 256, 232 at 512, 218 at 1024.
WIDE_ROWS = 256
"""A micro-batch with this many rows gains little by sharing matrix products."""
MAX_ROWS = 512
"""A shared matrix product with more rows is no faster; the rest form the next one."""


def pack(
    lengths: Sequence[int],
    *,
    max_tokens: int,
    max_rows: int | None = None,
    min_fill: float = 0.0,
) -> tuple[tuple[int, ...], ...]:
    """Groups rows (by index) so that each group, padded to its longest row, has at most
    `max_tokens` tokens; a longer row gets a group of its own. Longest rows first: what
    needs most memory is met at once, and the short ones fill the end.

    Rows of one length share groups first, so padding is least. A group has at most
    `max_rows`, none of them shorter than `min_fill` (0 to 1) of its longest.
    """
    if max_tokens < 1:
        raise ValueError(f"a micro-batch of {max_tokens} tokens holds nothing")
    groups: list[tuple[int, ...]] = []
    group: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda r: (-lengths[r], r)):
        if group and (
            (len(group) + 1) * lengths[group[0]] > max_tokens
            or len(group) == max_rows
            or lengths[row] < min_fill * lengths[group[0]]
        ):
            groups.append(tuple(group))
            group = []
        group.append(row)
    if group:
        groups.append(tuple(group))
    return tuple(groups)


def alike(num_rows: int, length: int, *, max_tokens: int) -> tuple[int, ...]:
    """The number of rows in each group that `pack` would make of `num_rows` rows of
    one `length`; takes no time per row."""
    each = max(1, max_tokens // max(1, length))
    full, rest = divmod(num_rows, each)
    return (each,) * full + ((rest,) if rest else ())


def chunk_tokens(
    num_rows: int, num_groups: int, *, tokens_in_flight: int, max_tokens: int
) -> int:
    """How many tokens of each prompt of a group of `num_rows` are computed in one pass,
    which `num_groups` groups share. All groups together have at least
    `tokens_in_flight`, so that loading the weights pays; one call has at least
    `max_tokens`."""
    in_call = max(max_tokens, -(-tokens_in_flight // num_groups))
    return max(1, in_call // num_rows)
