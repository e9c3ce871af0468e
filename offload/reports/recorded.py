"""The recorded timeline of a run, and what it says about its links. Pure."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...io.tier import Tier
from ...io.timeline import (
    ACTIVATIONS,
    CASTING,
    COMPUTE,
    MICRO_BATCHES,
    RANKS,
    STAGING,
    WAIT,
    Span,
    busy_seconds,
)
from ..monitoring.samples import ResourceSample
from .rank_record import RankRecord

_NO_LINKS = {ACTIVATIONS, CASTING, COMPUTE, MICRO_BATCHES, RANKS, WAIT}
_DEVICE = r"[a-z][a-z0-9_]*(:\d+)?"
"""The lane of a link from a peer is called after the peer."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """The timeline of a run.

    Spans use a clock in which the job began at `began_seconds`. Samples have seconds
    since then.
    """

    began_seconds: float
    spans: Sequence[Span]
    """The spans of the last passes."""
    samples: Sequence[ResourceSample]
    others: Sequence[RankRecord] = ()
    """What other ranks of the same model sent, in the same clock."""


@dataclass(frozen=True, slots=True)
class Roofline:
    """The speed of a run, and the limits that its links and its device set.

    Speeds are tokens per second, for the tokens that share a pass.
    """

    tokens_per_pass: float
    tokens_per_second: float
    compute_tokens_per_second: float
    """The speed while it computed."""
    passes_per_second: float | None
    """How many passes per second the slowest link could bring if it were always busy;
    None if nothing was streamed."""

    @property
    def ridge_tokens(self) -> float | None:
        """The number of tokens in a pass at which the slowest link takes as long as
        computing."""
        if self.passes_per_second is None:
            return None
        return self.compute_tokens_per_second / self.passes_per_second


def by_lane(spans: Iterable[Span]) -> dict[str, list[Span]]:
    found: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        found[span.lane].append(span)
    return dict(found)


def tier_of_lane(lane: str, tiers: Iterable[str]) -> str | None:
    """The tier at the end of the link `lane`; None if the lane is not a link of
    weights."""
    if lane in (Tier.DISK, STAGING):
        return Tier.DISK
    if lane == Tier.HOST:
        return Tier.HOST
    is_peer = lane not in _NO_LINKS and re.fullmatch(_DEVICE, lane) is not None
    return Tier.PEER if is_peer and Tier.PEER in tiers else None


def waits_by_tier(
    spans: Sequence[Span], wait_seconds: float, tiers: Iterable[str]
) -> dict[str, float]:
    """The `wait_seconds` for weights, by tier. They are divided as the waits in `spans`
    (the last passes) are."""
    tiers = list(tiers)
    tier_of: dict[str, str] = {}
    for span in spans:
        tier = tier_of_lane(span.lane, tiers)
        if tier is not None:
            tier_of[span.name] = tier
    found: dict[str, float] = defaultdict(float)
    for span in spans:
        if span.lane == WAIT:
            found[tier_of.get(span.name, Tier.DISK)] += span.seconds
    total = sum(found.values())
    if not total:
        return {Tier.DISK: wait_seconds}
    return {tier: wait_seconds * seconds / total for tier, seconds in found.items()}


def link_speeds(spans: Sequence[Span], tiers: Iterable[str]) -> dict[str, float]:
    """Bytes per second of each tier's link while it was busy. If a tier has two links,
    the slower one."""
    tiers = list(tiers)
    found: dict[str, float] = {}
    for lane, of_lane in by_lane(spans).items():
        tier = tier_of_lane(lane, tiers)
        busy = busy_seconds(of_lane)
        if tier is not None and busy:
            speed = sum(span.nbytes for span in of_lane) / busy
            found[tier] = min(speed, found.get(tier, speed))
    return found


def roofline(
    spans: Sequence[Span],
    *,
    tokens: int,
    passes: int,
    seconds: float,
    compute_seconds: float,
    tiers: Iterable[str],
) -> Roofline | None:
    """The speed and its limits; None if the run was too short.

    `spans` are those of the last passes; the other values are of the whole run.
    """
    if not (tokens and passes and seconds and compute_seconds):
        return None
    tiers = list(tiers)
    busy = max(
        (
            busy_seconds(of_lane)
            for lane, of_lane in by_lane(spans).items()
            if tier_of_lane(lane, tiers) is not None
        ),
        default=0.0,
    )
    return Roofline(
        tokens / passes,
        tokens / seconds,
        tokens / compute_seconds,
        num_passes(spans) / busy if busy else None,
    )


def num_passes(spans: Iterable[Span]) -> float:
    """How many passes `spans` cover; may be a fraction."""
    sites = [span.name for span in spans if span.lane == COMPUTE]
    return len(sites) / max(1, len(set(sites)))
