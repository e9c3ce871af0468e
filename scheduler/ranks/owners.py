"""Deals the blocks of a model to ranks. Pure."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from ...io.errors import UsageError

Cost = tuple[float, ...]
"""What a block costs in each measure, such as its bytes and its seconds."""


def deal(blocks: Sequence[Cost], ends: Cost, num_ranks: int) -> tuple[int, ...]:
    """The rank of each block: dealt in turn, so that each rank has the same share of
    each measure, as far as whole blocks allow.

    Rank 0 has the first block and the last one, and what comes before and after all
    blocks, which costs `ends`. Raises UsageError if there are too few blocks.
    """
    num = len(blocks)
    if num_ranks < 2:
        return (0,) * num
    if num < num_ranks + 1:
        raise UsageError(
            f"{num_ranks} ranks cannot share a model of {num} blocks: the first one "
            f"has two and each other one at least one; take at most {max(1, num - 1)} "
            "ranks"
        )
    costs = _normalised([*blocks, ends])
    blocks, ends = costs[:-1], costs[-1]
    ways = [_round_robin(num, num_ranks), _by_share(blocks, ends, num_ranks)]
    for owners in ways:
        _even_out(owners, blocks, ends, num_ranks)

    def worth(owners: Iterable[int]) -> tuple[float, int]:
        owners = list(owners)
        largest = max(max(load) for load in loads(blocks, ends, owners, num_ranks))
        excess = max(largest * num_ranks - _EVEN, 0.0)
        return round(excess, 3), sum(a == b for a, b in pairwise(owners))

    return tuple(min(ways, key=worth))


def loads(
    blocks: Sequence[Cost], ends: Cost, owners: Sequence[int], num_ranks: int
) -> list[Cost]:
    """What each rank has in each measure."""
    found = [[0.0] * len(ends) for _ in range(num_ranks)]
    found[0] = list(ends)
    for owner, cost in zip(owners, blocks, strict=True):
        found[owner] = [a + b for a, b in zip(found[owner], cost, strict=True)]
    return [tuple(load) for load in found]


def _normalised(costs: Sequence[Cost]) -> list[Cost]:
    """`costs`, with the sum of each measure 1."""
    sums = [sum(measure) or 1.0 for measure in zip(*costs, strict=True)]
    return [tuple(a / b for a, b in zip(cost, sums, strict=True)) for cost in costs]


def _round_robin(num: int, num_ranks: int) -> list[int]:
    return [block % num_ranks for block in range(num - 1)] + [0]


def _by_share(blocks: Sequence[Cost], ends: Cost, num_ranks: int) -> list[int]:
    """Each block between the first and the last goes to the rank that is the furthest
    behind its share; the next one in turn, if several are."""
    first, *between, last = (sum(cost) for cost in blocks)
    fixed = [first + last + sum(ends)] + [0.0] * (num_ranks - 1)
    mean = (sum(fixed) + sum(between)) / num_ranks
    shares = [max(mean - has, 0.0) for has in fixed]
    shares = [share / (sum(shares) or 1.0) for share in shares]
    given, dealt, owners = [0.0] * num_ranks, 0.0, [0]
    for cost in between:
        dealt += cost
        behind = [share * dealt - has for share, has in zip(shares, given, strict=True)]
        turn = [-((rank - owners[-1] - 1) % num_ranks) for rank in range(num_ranks)]
        owner = max(
            range(num_ranks), key=lambda rank: (round(behind[rank], 9), turn[rank])
        )
        given[owner] += cost
        owners.append(owner)
    return [*owners, 0]


def _even_out(
    owners: list[int], blocks: Sequence[Cost], ends: Cost, num_ranks: int
) -> None:
    """Moves blocks between ranks, or swaps two, while that makes the largest load
    smaller."""

    def largest() -> float:
        return max(max(load) for load in loads(blocks, ends, owners, num_ranks))

    for _ in range(len(blocks)):
        best = largest() - 1e-9
        if best * num_ranks <= _EVEN:
            return
        change: tuple[tuple[int, int], ...] | None = None
        for one in range(1, len(owners) - 1):
            before = owners[one]
            for rank in {*range(num_ranks)} - {before}:
                owners[one] = rank
                if before in owners and (now := largest()) < best:
                    best, change = now, ((one, rank),)
            owners[one] = before
            for other in range(one + 1, len(owners) - 1):
                if owners[other] == before or len(owners) > _FEW:
                    continue
                owners[one], owners[other] = owners[other], before
                if (now := largest()) < best:
                    best, change = now, ((one, owners[one]), (other, before))
                owners[one], owners[other] = before, owners[one]
        if change is None:
            return
        for block, rank in change:
            owners[block] = rank


_EVEN = 1.02
"""Up to this multiple of the mean, a load is even: then turns matter more."""
_FEW = 32
"""Up to this many blocks, pairs are tried, too."""
