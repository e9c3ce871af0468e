"""Decides how stacked experts are divided into pieces that are loaded one by one. Pure.

Stacked experts are a module whose parameters are all [experts, ...]. A *piece* is a
range of them: a unit of weights of its own. A *window* is a range of pieces: a site, in
which pieces are computed one after the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

LARGE_BYTES = 4 << 20
"""A piece has this many bytes or more, where the memory allows it: reads of this size
run at a drive's full rate."""
_PIECES_AT_ONCE = 32
"""Pieces are smaller than that, if fewer than so many would fit into a window."""


def piece_of(num_experts: int, expert_bytes: int, window_bytes: int) -> int:
    """How many experts make a piece, if a window has `window_bytes`. Pieces are of
    nearly equal size; the last one may be smaller."""
    wanted = min(LARGE_BYTES, window_bytes // _PIECES_AT_ONCE)
    most = min(num_experts, max(1, wanted // max(1, expert_bytes)))
    num_pieces = -(-num_experts // most)
    return -(-num_experts // num_pieces)


def ranges(num: int, step: int) -> tuple[tuple[int, int], ...]:
    """The numbers below `num`, as ranges of `step`."""
    return tuple((low, min(low + step, num)) for low in range(0, num, step))


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """A module of stacked experts that can be cut into ranges of them."""

    name: str
    module: nn.Module
    tensors: Mapping[str, str]
    """The name of the streamed tensor, by the attribute of the module."""
    num_experts: int
    nbytes: int
    is_dense: bool = False
    """Whether each expert gets tokens of its own, in order, instead of those for which
    a router has chosen it: all are needed in each pass."""

    @property
    def expert_bytes(self) -> int:
        """Bytes of the largest expert."""
        return -(-self.nbytes // self.num_experts)


def pieces_of(
    stack: ExpertStack, window_bytes: int
) -> tuple[tuple[tuple[int, int], ...], ...]:
    """The pieces of each window of `stack`, as ranges of experts.

    A window has at most `window_bytes`, but at least one piece.
    """
    step = piece_of(stack.num_experts, stack.expert_bytes, window_bytes)
    pieces = ranges(stack.num_experts, step)
    most = max(1, window_bytes // (step * stack.expert_bytes))
    each = -(-len(pieces) // -(-len(pieces) // most))  # nearly equally many
    return tuple(pieces[low:high] for low, high in ranges(len(pieces), each))
