"""What bound a run, and what to change: tables of cases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml

from penstock import Policy
from penstock.offload.reports.bound import what_bound
from penstock.offload.reports.counts import Counts

GIB = 1 << 30
SCORING = Counts(
    seconds=100.0,
    compute_seconds=99.0,
    wait_seconds={"disk": 1.0},
    kv_wait_seconds=0.0,
    kv_bytes={},
    has_lossy_kv=False,
    tokens=40_000,
    tokens_padding=0,
    rows=500,
    micro_batches=80,
    max_in_flight=8,
    width=8,
    is_generating=False,
    in_flight=4096,
    micro_batch=512,
    rows_per_product=500.0,
    is_coalesced=False,
    is_compiled=False,
    has_slow_dtype=False,
    streamed_bytes=4 * GIB,
    host_memory=0,
    free_host_bytes=16 * GIB,
)
GENERATING = replace(
    SCORING,
    is_generating=True,
    in_flight=256,
    micro_batch=8,
    width=32,
    max_in_flight=32,
    is_coalesced=True,
    rows_per_product=256.0,
)
WAITING_FOR_KV: dict[str, Any] = {"kv_wait_seconds": 30.0, "compute_seconds": 99.0}
WAITING: dict[str, Any] = {"compute_seconds": 59.0, "wait_seconds": {"disk": 41.0}}


@pytest.mark.parametrize(
    ("case", "by", "says", "settings"),
    [
        (SCORING, "compute", "in time (it waited 1%", ["compile: true"]),
        (
            replace(SCORING, has_slow_dtype=True, is_compiled=True),
            "compute",
            "Computing",
            ["dtype: float32"],
        ),
        (
            replace(SCORING, **WAITING),
            "disk",
            "waited 41% of the time for weights from disk",
            ["tokens_in_flight: 7168", "host_memory: 1.7GiB"],
        ),
        (
            replace(SCORING, **WAITING, host_memory=GIB),
            "disk",
            "41%",
            ["tokens_in_flight: 7168", "host_memory: 2.7GiB"],
        ),
        (
            replace(SCORING, **WAITING, free_host_bytes=GIB),
            "disk",
            "41%",
            ["tokens_in_flight: 7168"],
        ),
        (
            replace(
                SCORING, compute_seconds=50.0, wait_seconds={"disk": 9.0, "host": 41.0}
            ),
            "host",
            "waited 50% of the time for weights from host memory",
            ["tokens_in_flight: 8704"],
        ),
        (
            replace(SCORING, **WAITING, tokens=3000, streamed_bytes=0),
            "rows",
            "3,000 tokens are too few",
            [],
        ),
        (
            replace(GENERATING, **WAITING, rows=100, streamed_bytes=0),
            "rows",
            "100 rows are too few",
            [],
        ),
        (
            replace(GENERATING, **WAITING, streamed_bytes=0),
            "disk",
            "41%",
            ["sequences_in_flight: 440"],
        ),
        (
            replace(SCORING, **WAITING, max_in_flight=3, streamed_bytes=0),
            "activations",
            "only 3 of 8 micro-batches",
            ["activations: host"],
        ),
        (
            replace(SCORING, **WAITING, max_in_flight=3, micro_batches=3),
            "disk",
            "41%",
            ["tokens_in_flight: 7168", "host_memory: 1.7GiB"],
        ),
        (
            replace(GENERATING, **WAITING_FOR_KV, kv_bytes={"disk": 40 * GIB}),
            "kv",
            "waited 30% of the time for keys and values from disk",
            ["kv: {tier: host, limits: {host: 8GiB}}", "kv: {dtype: int8}"],
        ),
        (
            replace(
                GENERATING,
                **WAITING_FOR_KV,
                kv_bytes={"host": 4 * GIB},
                has_lossy_kv=True,
            ),
            "kv",
            "from host memory",
            [],
        ),
        (
            replace(GENERATING, kv_wait_seconds=9.0, kv_bytes={"disk": GIB}),
            "compute",
            "in time",
            ["micro_batch_sequences: 64"],
        ),
        (
            replace(SCORING, tokens_padding=20_000),
            "padding",
            "33% of what was computed was padding",
            ["micro_batch_tokens: 256"],
        ),
        (
            replace(SCORING, micro_batch=64, rows_per_product=60.0),
            "width",
            "60 rows on average",
            ["micro_batch_tokens: 512"],
        ),
        (
            replace(GENERATING, rows_per_product=8.0, is_coalesced=False),
            "width",
            "8 rows on average",
            ["coalesce: auto", "micro_batch_sequences: 64"],
        ),
        (
            replace(GENERATING, in_flight=64, rows_per_product=64.0),
            "width",
            "64 rows on average",
            ["sequences_in_flight: 264", "micro_batch_sequences: 16"],
        ),
        (
            replace(GENERATING, in_flight=64, rows=64, rows_per_product=64.0),
            "width",
            "64 rows on average",
            ["micro_batch_sequences: 16"],
        ),
        (GENERATING, "compute", "in time", ["micro_batch_sequences: 64"]),
        (replace(GENERATING, micro_batch=64), "compute", "in time", []),
        (
            replace(GENERATING, micro_batch=64, is_coalesced=False),
            "compute",
            "in time",
            ["compile: true"],
        ),
        (
            replace(SCORING, compute_seconds=60.0, wait_seconds={"disk": 2.0}),
            "overhead",
            "38% of the time went neither",
            [],
        ),
    ],
)
def test_what_bound_says_by_what_why_and_which_setting(
    case: Counts, by: str, says: str, settings: list[str]
) -> None:
    found = what_bound(case)
    assert found.by == by
    assert says in found.why
    assert [a.setting for a in found.advice if a.setting is not None] == settings
    assert found.advice
    assert 0 <= found.share <= 1
    for advice in found.advice:  # each can be put into a policy file as it stands
        if advice.setting is not None:
            Policy(**yaml.safe_load(advice.setting))


def test_a_job_of_which_nothing_was_counted_is_bound_by_nothing_odd() -> None:
    empty = replace(
        SCORING,
        seconds=0.0,
        compute_seconds=0.0,
        wait_seconds={},
        tokens=0,
        rows=0,
        micro_batches=0,
        max_in_flight=0,
        rows_per_product=0.0,
    )
    assert what_bound(empty).by == "compute"


def test_only_waiting_makes_no_endless_number() -> None:
    all_waiting = replace(SCORING, compute_seconds=0.0, wait_seconds={"disk": 100.0})
    assert what_bound(all_waiting).advice[0].setting == "tokens_in_flight: 40448"
    many = replace(all_waiting, tokens=10_000_000)
    assert what_bound(many).advice[0].setting == "tokens_in_flight: 270336"
    few = replace(all_waiting, tokens=10)
    assert what_bound(few).advice[0].effect.startswith("Many more tokens")


def test_no_more_in_flight_is_asked_for_than_the_job_has() -> None:
    short = replace(SCORING, **WAITING, tokens=5000, streamed_bytes=0)
    (advice,) = what_bound(short).advice
    assert advice.setting == "tokens_in_flight: 5120"
    assert "only more of them in one job (7,000) would hide it" in advice.effect
    few = replace(
        GENERATING, in_flight=64, rows=72, rows_per_product=46.0, micro_batch=12
    )
    (advice,) = (a for a in what_bound(few).advice if a.setting is not None)
    assert advice.setting == "sequences_in_flight: 72"
    assert "1.1x wider" in advice.effect


def test_more_of_what_hides_it_is_told_as_a_number() -> None:
    few = replace(SCORING, **WAITING, tokens=3000, streamed_bytes=0)
    assert "1.7x more tokens in one job (5,100)" in what_bound(few).advice[0].effect


def test_a_machine_that_was_busy_elsewhere_is_no_slow_device() -> None:
    bound = what_bound(replace(SCORING, taken_elsewhere=0.5))
    assert bound.by == "busy"
    assert "other processes or guests had 50% of the CPU time" in bound.why
    assert "2.0x as fast" in bound.advice[-1].effect
    assert what_bound(replace(SCORING, taken_elsewhere=0.1)).by == "compute"
    assert what_bound(replace(SCORING, **WAITING, taken_elsewhere=0.5)).by == "disk"


@pytest.mark.parametrize(("elsewhere", "by"), [(0.7, "busy"), (0.16, "padding")])
def test_of_padding_and_a_busy_machine_what_is_more_is_named(
    elsewhere: float, by: str
) -> None:
    padded = replace(SCORING, tokens_padding=SCORING.tokens // 3)
    assert by in what_bound(replace(padded, taken_elsewhere=elsewhere)).by


def test_waiting_for_other_ranks_is_no_overhead() -> None:
    found = what_bound(
        replace(
            SCORING,
            compute_seconds=39.0,
            rank_wait_seconds=60.0,
            others_wait_seconds=50.0,
        )
    )
    assert found.by == "ranks"
    assert "for their weights" in found.why
