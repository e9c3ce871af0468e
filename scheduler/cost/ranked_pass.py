"""The time of a pass over a model that several ranks share, block by block. Pure.

Each rank computes its own steps in their order, each for all micro-batches before the
next, and loads its own weights meanwhile. A micro-batch goes from the rank of one step
to that of the next one in a message.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .pipeline import Clock, PassCost, PassTime, PassWork, WeightLoad, busy_links

RANKS = "ranks"
"""What binds a pass in which ranks wait for each other."""
_MOST_APART = 32
"""More micro-batches are taken as so many, of several each."""
_LOST = 1.1
"""A pass that takes so many times as long as its slowest rank is bound by waiting for
others."""


@dataclass(frozen=True, slots=True)
class RankStep:
    """Sites of one block, which one rank computes."""

    rank: int
    kind: int
    """Which of the works has the sites: ranks with as many blocks share one."""
    sites: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Messages:
    """What sending hidden states to another rank takes."""

    bytes_per_second: float
    seconds: float
    """The time until a message of no size has arrived and is read."""
    stub_seconds: float
    """Time of a rank, for each micro-batch, in a call of a block of another rank."""

    def hop_seconds(self, nbytes: float) -> float:
        return self.seconds + nbytes / self.bytes_per_second


@dataclass(frozen=True, slots=True)
class _Part:
    """A step with its times: what the micro-batches take together, and its loads."""

    step: RankStep
    stubs: int
    """The calls of other ranks' steps that lie between it and this rank's last one."""


def ranked_cost(
    works: Sequence[PassWork],
    steps: Sequence[RankStep],
    messages: Messages,
    *,
    num: int,
    hidden_bytes: float,
) -> PassCost:
    """The cost of a pass of `num` micro-batches, whose hidden states take
    `hidden_bytes` together, through `steps` in their order. `works` are those of each
    kind of rank."""
    line = _Line(works, steps, messages, num=num, hidden_bytes=hidden_bytes)
    first = line.run(is_first=True)
    second = line.run()
    steady = line.run() - second
    slowest = max((work.cost() for work in works), key=lambda cost: cost.steady)
    compute = slowest.compute_seconds + slowest.outside_seconds
    busiest = max(
        (busy_links(work.loads) for work in works),
        key=lambda busy: max(busy.values(), default=0.0),
    )
    wait = max(0.0, steady - compute)
    time = PassTime(first, steady, wait if wait > 1e-9 * steady else 0.0, busiest)
    if steady > _LOST * slowest.steady:
        time = replace(time, busy={**busiest, RANKS: steady})
    return PassCost(time, compute, 0.0)


class _Line:
    """The ranks between passes: when each is free, and each micro-batch is."""

    def __init__(
        self,
        works: Sequence[PassWork],
        steps: Sequence[RankStep],
        messages: Messages,
        *,
        num: int,
        hidden_bytes: float,
    ) -> None:
        self._works = works
        self._parts = _parts(steps)
        apart = min(num, _MOST_APART)
        self._times = num / apart
        self._messages = messages
        self._hop = messages.hop_seconds(hidden_bytes / max(num, 1))
        kinds = {step.rank: step.kind for step in steps}
        self._clocks = {
            rank: Clock(works[kind].room_bytes, works[kind].lookahead)
            for rank, kind in kinds.items()
        }
        self._outside = {
            rank: works[kind].outside_seconds for rank, kind in kinds.items()
        }
        self._done = [0.0] * apart
        self._last = self._parts[0].step.rank

    def run(self, *, is_first: bool = False) -> float:
        """One more pass. Returns the time at which it has ended."""
        for part in self._parts:
            step, work = part.step, self._works[part.step.kind]
            seconds = work.first_compute if is_first else work.compute
            loads = work.first_loads if is_first else work.loads
            clock = self._clocks[step.rank]
            stubs = part.stubs * self._messages.stub_seconds * self._times
            hop = self._hop if step.rank != self._last else 0.0
            end = self._outside[step.rank] if part is self._parts[-1] else 0.0
            for site in step.sites:
                each = (seconds[site] + end) / len(self._done) + stubs
                needed = loads[site]
                self._serve(clock, needed, clock.open(needed), each, hop)
                stubs = hop = end = 0.0
            self._last = step.rank
        for rank, clock in self._clocks.items():
            if rank != self._last:
                clock.close((), clock.now, clock.now + self._outside[rank])
        return max(self._done)

    def _serve(
        self,
        clock: Clock,
        needed: Sequence[WeightLoad],
        at: float,
        each: float,
        hop: float,
    ) -> None:
        """All micro-batches, one after the other, at one site that is open from `at`
        on."""
        begun = max(at, self._done[0] + hop)
        for index, done in enumerate(self._done):
            at = max(at, done + hop) + each
            self._done[index] = at
        clock.close(needed, begun, at)


def _parts(steps: Sequence[RankStep]) -> list[_Part]:
    """The steps, each with the number of calls that its rank makes of others' steps
    before it."""
    found: list[_Part] = []
    seen: dict[int, int] = {}
    for number, step in enumerate(steps):
        found.append(_Part(step, number - seen.get(step.rank, -1) - 1))
        seen[step.rank] = number
    return found
