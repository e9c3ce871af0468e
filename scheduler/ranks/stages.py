"""The stages of a forward, which ranks compute in turn, and where a micro-batch is.
Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

EMBEDDING = 0
"""The first stage: the input embedding."""


class LapPosition(NamedTuple):
    """Where a micro-batch is: positions are compared as tuples."""

    lap: int
    """How often the forward has begun again; all ranks count from the same lap."""
    stage: int


@dataclass(frozen=True)
class RankStages:
    """The stages of a model, as `rank` sees them: the input embedding, each block, and
    the head if there is one. `owners` is the rank that computes each of them."""

    owners: tuple[int, ...]
    rank: int
    has_head: bool
    returns: tuple[str | None, ...] = ()
    """What each block returns, see `Message.text`; None if that is not known. Empty:
    tensors."""

    def returned_by(self, stage: int) -> str | None:
        """What `stage` returns; None if that is not known."""
        if 0 < stage <= len(self.returns):
            return self.returns[stage - 1]
        return ""

    @property
    def num_ranks(self) -> int:
        return max(self.owners) + 1

    @property
    def last_block(self) -> int:
        """The stage of the last block."""
        return len(self.owners) - 1 - self.has_head

    @property
    def head_owner(self) -> int:
        """The rank that computes what comes after the last block."""
        return self.owners[-1]

    def is_own(self, stage: int) -> bool:
        return self.owners[stage] == self.rank

    def takers(self, stage: int) -> tuple[int, ...]:
        """The ranks, other than the owner, that need the output of `stage`: the one
        that computes the next stage; all, for what a caller sees, or where only the
        message says what the stage returns."""
        owner = self.owners[stage]
        if stage >= self.last_block or self.returned_by(stage) is None:
            found: Sequence[int] = range(self.num_ranks)
        else:
            found = (self.owners[stage + 1],)
        return tuple(rank for rank in found if rank != owner)

    def next_own(self, at: LapPosition) -> LapPosition:
        """The position after `at` at which this rank computes next."""
        own = [stage for stage, owner in enumerate(self.owners) if owner == self.rank]
        later = [stage for stage in own if stage > at.stage]
        return (
            LapPosition(at.lap, later[0]) if later else LapPosition(at.lap + 1, own[0])
        )


class Address(NamedTuple):
    """What a message between ranks belongs to: a call of a stage by a micro-batch.

    All ranks count the calls that a micro-batch makes, whoever computes them, so no
    order of messages is needed.
    """

    run: int
    """The number of the run among those of the model; `PLAIN` outside of sweeps."""
    micro_batch: int
    attempt: int
    """How often the micro-batch has begun again to count, after an error that ranks
    had together."""
    call: int


PLAIN = -1
"""The run of calls outside of sweeps."""
NO_CALL = Address(0, 0, 0, 0)


@dataclass(slots=True)
class CallState:
    """Where a micro-batch is on this rank, and how many calls it has made."""

    run: int
    micro_batch: int
    lap: int = 0
    stage: int = -1
    attempt: int = 0
    call: int = 0
    num_sites: int = 0
    """The sites that it has reached in its stage."""
    fingerprint: int = 0
    """A checksum of the token ids of its last forward."""
    has_nan: bool = False
    """Whether the output of the stage before has NaNs."""
    target: LapPosition | None = field(default=None)
    """Where this rank computes it next, while it waits for another rank."""

    @property
    def position(self) -> LapPosition:
        return LapPosition(self.lap, self.stage)

    def enter(self, stage: int) -> Address:
        """The micro-batch calls `stage`."""
        if stage <= self.stage:
            self.lap += 1
        self.stage = stage
        self.num_sites = 0
        return self.count()

    def count(self) -> Address:
        """It makes a call that is no stage."""
        self.call += 1
        return Address(self.run, self.micro_batch, self.attempt, self.call)

    def begin_again(self) -> None:
        """All ranks had an error at the same call: they count from one again."""
        self.attempt += 1
        self.call = 0


@dataclass(frozen=True, slots=True)
class Waits:
    """The micro-batches on this rank that are not running."""

    here: Sequence[tuple[LapPosition, bool]]
    """Those that wait at a site: their positions, and whether the site is the first one
    that they have reached in their stage."""
    coming: Sequence[LapPosition]
    """The targets of those that another rank computes."""


def servable(waits: Waits) -> frozenset[int]:
    """Which of `waits.here` may be served now; none while one that is coming has to be
    waited for.

    All ranks serve the lowest position first, so each block is loaded once a lap for
    all micro-batches, and no two ranks wait for each other: the rank whose turn it is
    with the lowest position of all has nobody to wait for.
    """
    if not waits.here:
        return frozenset()
    lowest = min(position for position, _ in waits.here)
    coming = min(waits.coming, default=None)
    if coming is not None and coming < lowest:
        return frozenset()
    return frozenset(
        index
        for index, (position, is_first) in enumerate(waits.here)
        if position == lowest and (is_first or coming != lowest)
    )


def is_waited_for(at: LapPosition, waits: Waits) -> bool:
    """Whether a site that is open for `at` stays open for one that is coming."""
    lowest = min([*(position for position, _ in waits.here), *waits.coming], default=at)
    return lowest >= at and at in waits.coming
