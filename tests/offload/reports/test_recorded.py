"""What was recorded says of its links; samples that thin out; speeds of passes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

import runs
from penstock.io.timeline import Span
from penstock.offload.monitoring.samples import (
    ResourceSample,
    Samples,
    Step,
    Window,
    speeds,
)
from penstock.offload.reports.recorded import (
    link_speeds,
    num_passes,
    roofline,
    waits_by_tier,
)


def sample(seconds: float, **values: object) -> ResourceSample:
    empty = ResourceSample(
        seconds=seconds, stage="scoring", stage_seconds=seconds, bytes_read={}
    )
    return replace(empty, **values)  # type: ignore[arg-type]


def test_waiting_is_laid_to_the_tier_whose_weights_were_waited_for() -> None:
    spans = [
        Span("disk", "a", 0, 1, 10),
        Span("host", "b", 0, 1, 10),
        Span("wait", "a", 0, 3),
        Span("wait", "b", 3, 4),
    ]
    found = waits_by_tier(spans, 8.0, ["disk", "host"])
    assert found == {"disk": 6.0, "host": 2.0}
    assert waits_by_tier([], 8.0, ["disk"]) == {"disk": 8.0}


def test_a_peers_link_is_the_tier_peer_wherever_it_is() -> None:
    spans = [Span("cuda:1", "a", 0, 2, 10), Span("wait", "a", 0, 1)]
    assert waits_by_tier(spans, 5.0, ["disk", "peer"]) == {"peer": 5.0}
    assert link_speeds(spans, ["disk", "peer"]) == {"peer": 5.0}


def test_a_link_is_as_fast_as_the_slower_of_the_two_that_it_is_made_of() -> None:
    spans = [
        Span("disk", "a", 0, 1, 100),
        Span("staging", "a", 1, 5, 100),
        Span("compute", "a", 0, 9),
        Span("cast", "a", 0, 9, 5),
    ]
    assert link_speeds(spans, ["disk"]) == {"disk": 25.0}


def test_the_roof_is_flat_where_computing_binds_and_slanted_where_the_link_does() -> (
    None
):
    spans = [
        Span("disk", "a", 0, 2, 200),
        Span("staging", "a", 1, 5, 200),
        Span("cast", "a", 0, 90, 200),
        *(Span("compute", name, 0, 1) for name in ("a", "b", "a", "b")),
    ]
    found = roofline(
        spans, tokens=1000, passes=10, seconds=20.0, compute_seconds=5.0, tiers=["disk"]
    )
    assert found is not None
    assert found.tokens_per_pass == 100
    assert found.tokens_per_second == 50
    assert found.compute_tokens_per_second == 200
    assert found.passes_per_second == 0.5, "two in the four seconds of the slower link"
    assert found.ridge_tokens == 400


def test_nothing_streamed_leaves_a_flat_roof_and_no_run_none() -> None:
    def of(tokens: int) -> object:
        return roofline(
            [], tokens=tokens, passes=1, seconds=2.0, compute_seconds=1.0, tiers=[]
        )

    assert of(0) is None
    flat = of(8)
    assert getattr(flat, "passes_per_second", 0) is None
    assert getattr(flat, "ridge_tokens", 0) is None


def test_passes_are_counted_with_their_parts() -> None:
    assert num_passes(runs.spans(num_passes=3)) == 3
    computed = [Span("compute", name, 0, 1) for name in "abcda"]
    assert num_passes(computed) == 1.25
    assert num_passes([]) == 0


@pytest.mark.parametrize("num", [0, 1, 2, 7, 8, 9, 100, 1000])
def test_samples_thin_out_and_keep_the_first_and_the_last(num: int) -> None:
    samples = Samples(max_samples=8)
    for second in range(num):
        samples.add(sample(second))
        assert len(samples) <= 8
    kept = [found.seconds for found in samples.all()]
    assert kept == sorted(set(kept))
    if num:
        assert (kept[0], kept[-1]) == (0, num - 1)
    if num > 8:
        steps = {b - a for a, b in pairwise(kept[:-1])}
        assert len(steps) == 1, "evenly, but for the last"
        assert len(kept) >= 4


def test_speed_is_that_of_whole_passes() -> None:
    """Tokens of a pass are counted at its end: between, there is nothing to see."""
    samples = [
        sample(0.0),
        sample(1.0, passes=1),
        sample(2.0, passes=1),
        sample(3.0, passes=2, tokens=100),
        sample(4.0, passes=2, tokens=100),
        sample(5.0, passes=3, tokens=300),
        sample(6.0, passes=3, tokens=350),
    ]
    assert speeds(samples) == [
        Step(1.0, 3.0, 50.0),
        Step(3.0, 5.0, 100.0),
        Step(5.0, 6.0, 50.0),
    ]


def test_the_speed_of_no_pass_is_nothing() -> None:
    assert speeds([]) == []
    assert speeds([sample(0.0), sample(1.0, passes=1)]) == []


def test_many_passes_are_put_together() -> None:
    samples = [sample(i, passes=i + 1, tokens=10 * i) for i in range(1000)]
    found = speeds(samples)
    assert 50 < len(found) <= 121
    assert found[-1].end_seconds == 999
    for step in found:
        assert step.tokens_per_second == pytest.approx(10)


def test_a_window_says_what_happened_within_it() -> None:
    before = sample(10.0, wait_seconds=1.0, compute_seconds=4.0, bytes_read={"disk": 5})
    now = sample(12.0, wait_seconds=2.0, compute_seconds=5.0, bytes_read={"disk": 25})
    window = Window(before, now)
    assert window.bytes_per_second == {"disk": 10.0}
    assert window.waiting == 0.5
    assert Window(now, now).bytes_per_second == {"disk": 0.0}
    assert Window(now, now).waiting == 0.0


def test_tokens_under_way_count_for_the_speed() -> None:
    under_way = sample(10.0, tokens=100, tokens_through=150.0)
    assert under_way.tokens_per_second == 15.0
    assert sample(0.0, tokens=100).tokens_per_second == 0.0
