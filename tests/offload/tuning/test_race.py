"""Successive halving on made-up timings: who wins, who is out, and going on again."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from penstock.offload.tuning.candidates import Around, candidates, widest
from penstock.offload.tuning.race import (
    FINALISTS,
    LAPS,
    START,
    Heat,
    Settings,
    Timing,
    Verdict,
    failures,
    heats_left,
    next_heat,
)

A, B, C, D, E, F = ((("lookahead", number),) for number in range(3, 9))
DEEP: Settings = (("io.depth", 8),)
OFF: Settings = (("coalesce", "off"),)
Rate = Callable[[Heat], float | None]


def run(
    tried: Sequence[Settings], rate: Rate, timings: list[Timing] | None = None
) -> tuple[Verdict, list[Timing]]:
    """A race to its end, gone on with after `timings`."""
    known = list(timings or [])
    while isinstance(heat := next_heat(tried, known), Heat):
        error = "" if (found := rate(heat)) is not None else "does not fit"
        known.append(Timing(heat.settings, heat.rung, heat.lap, found, error))
    return heat, known


def fixed(rates: Mapping[Any, float | None], other: float = 100.0) -> Rate:
    return lambda heat: rates.get(heat.settings, other)


def noisy(rates: Mapping[Any, float], share: float, seed: int) -> Rate:
    chosen = random.Random(seed)

    def rate(heat: Heat) -> float:
        factor = 1.0 + chosen.uniform(-share, share)
        return rates.get(heat.settings, 100.0) * factor

    return rate


def test_the_fastest_wins_and_only_the_better_half_runs_for_longer() -> None:
    tried = [A, B, C, D, E, F]
    rates = {A: 90.0, B: 95.0, C: 130.0, D: 85.0, E: 80.0, F: 98.0}
    verdict, timings = run(tried, fixed(rates))
    assert verdict.winner is not None
    assert verdict.winner.settings == C
    assert verdict.winner.gain == pytest.approx(0.3)
    assert {final.settings for final in verdict.finals} == {C, F, B}
    assert len(verdict.finals) == FINALISTS
    assert len(timings) == 7 + 4 + 2 * (LAPS - 1), "who loses a lap is out"


def test_ties_leave_the_start_where_it_is() -> None:
    verdict, _ = run([A, B, C, D, E], fixed({}))
    assert verdict.winner is None
    assert [final.settings for final in verdict.finals] == [A, B, C], "in their order"


def test_what_is_slower_than_the_start_never_wins() -> None:
    verdict, _ = run([A, B], fixed({START: 100.0, A: 99.0, B: 50.0}))
    assert verdict.winner is None
    assert verdict.finals[0].settings == A


def test_a_lucky_lap_is_no_win() -> None:
    def rate(heat: Heat) -> float:
        return 200.0 if heat.settings == A and heat.lap == 2 else 101.0

    verdict, _ = run([A], rate)
    assert verdict.winner is None
    lucky = fixed({A: 101.0})
    assert run([A], lucky)[0].winner is not None, "a little, but in every lap"


@pytest.mark.parametrize("seed", range(20))
def test_noise_hides_no_clear_winner(seed: int) -> None:
    rates = {A: 60.0, B: 70.0, C: 200.0, D: 65.0, E: 75.0}
    verdict, _ = run(list(rates), noisy(rates, 0.1, seed))
    assert verdict.winner is not None
    assert verdict.winner.settings == C


def test_noise_alone_seldom_makes_a_winner() -> None:
    found = [run([A, B, C], noisy({}, 0.1, seed))[0] for seed in range(200)]
    assert sum(verdict.winner is not None for verdict in found) < 20


def test_a_machine_that_slows_down_all_the_while_favours_no_one() -> None:
    num = 0

    def rate(heat: Heat) -> float:
        nonlocal num
        num += 1
        return 100.0 * 0.98**num

    verdict, _ = run([A, B, C], rate)
    assert verdict.winner is None


def test_who_cannot_run_is_out_and_is_named() -> None:
    verdict, timings = run([A, B, C, D, E], fixed({A: None, B: 120.0}))
    assert verdict.winner is not None
    assert verdict.winner.settings == B
    assert failures(timings) == {A: "does not fit"}
    assert sum(timing.settings == A for timing in timings) == 1, "it is not tried again"


def test_who_fails_in_the_last_rung_is_out_of_it() -> None:
    def rate(heat: Heat) -> float | None:
        if heat.settings == A:
            return None if heat.lap == 1 else 150.0
        return 100.0

    verdict, timings = run([A, B], rate)
    assert [final.settings for final in verdict.finals] == [B]
    assert A in failures(timings)


def test_where_nobody_else_can_run_the_start_stays() -> None:
    verdict, _ = run([A, B, C, D], fixed(dict.fromkeys((A, B, C, D))))
    assert verdict == Verdict(100.0, 1, ())
    assert verdict.winner is None


def test_what_helps_alone_is_tried_together() -> None:
    def rate(heat: Heat) -> float:
        rates = {"io.depth": 1.1, "coalesce": 1.2, "lookahead": 0.9}
        product = 100.0
        for key, _ in heat.settings:
            product *= rates[key]
        return product

    verdict, _ = run([DEEP, OFF, A, B], rate)
    assert verdict.winner is not None
    assert dict(verdict.winner.settings) == {"coalesce": "off", "io.depth": 8}
    assert verdict.winner.gain == pytest.approx(0.32)


def test_a_race_that_is_stopped_anywhere_goes_on_to_the_same_end() -> None:
    rates = {A: 90.0, B: None, C: 130.0, D: 85.0, E: 110.0}
    whole, timings = run(list(rates), fixed(rates))
    for num in range(len(timings) + 1):
        verdict, again = run(list(rates), fixed(rates), timings[:num])
        assert (verdict, again) == (whole, timings)


def test_timings_of_others_are_nobodys() -> None:
    stray = [Timing(F, 0, 0, 1e9), Timing(A, 7, 0, 1e9)]
    verdict, _ = run([A], fixed({}), stray)
    assert verdict.winner is None


def test_what_is_left_at_most_is_told_before_each_heat() -> None:
    tried = [A, B, C, D, E]
    for start in (50.0, 100.0, 200.0):
        _, timings = run(tried, fixed({START: start}))
        known = [timings[:num] for num in range(len(timings) + 1)]
        left = [len(list(heats_left(tried, some))) for some in known]
        assert left[0] >= len(timings)
        assert left[-1] == 0
        if start == 50.0:
            assert left == list(range(len(timings), -1, -1)), "nobody lost a lap"


SEQUENCES = {
    "micro_batch_key": "micro_batch_sequences",
    "in_flight_key": "sequences_in_flight",
    "joins_products": True,
}


def around(**changed: object) -> Around:
    values = {
        "micro_batch_tokens": 512,
        "tokens_in_flight": 1024,
        "micro_batch_sequences": 8,
        "sequences_in_flight": 32,
        "device_memory": 1 << 30,
        "host_memory": None,
        "lookahead": 2,
        "coalesce": "auto",
        "io.reader": "libaio",
        "io.threads": 2,
        "io.depth": 4,
    }
    settings: dict[str, object] = {
        "values": values,
        "is_open": frozenset(values),
        "micro_batch_key": "micro_batch_tokens",
        "in_flight_key": "tokens_in_flight",
        "joins_products": False,
        "waits_for_links": True,
        "is_compiled": False,
        "readers": {"libaio": 1e9, "threads": 9e8, "aiofiles": 1e8},
        "least_bytes": 256 << 20,
    }
    return Around(**{**settings, **changed})  # type: ignore[arg-type]


def keys_of(found: list[Settings]) -> set[str]:
    return {key for settings in found for key, _ in settings}


def test_candidates_change_what_matters_and_only_what_is_open() -> None:
    found = candidates(around())
    assert keys_of(found) == {
        "micro_batch_tokens",
        "tokens_in_flight",
        "device_memory",
        "io.reader",
        "io.depth",
        "lookahead",
    }
    assert (("io.reader", "threads"),) in found
    assert (("io.reader", "aiofiles"),) not in found, "a tenth as fast"
    assert START not in found
    assert len(set(found)) == len(found)
    only = candidates(around(is_open=frozenset({"lookahead"})))
    assert only == [(("lookahead", 3),), (("lookahead", 1),)]
    assert candidates(around(is_open=frozenset())) == []


def test_candidates_of_generating_are_sequences_and_coalesce() -> None:
    found = candidates(around(**SEQUENCES))
    assert (("coalesce", "off"),) in found
    assert "micro_batch_tokens" not in keys_of(found)
    assert widest(around(**SEQUENCES), found) == 64
    compiled = candidates(around(**SEQUENCES, is_compiled=True))
    assert "coalesce" not in keys_of(compiled)


def test_where_links_take_little_time_neither_reading_nor_memory_is_tried() -> None:
    found = keys_of(candidates(around(waits_for_links=False)))
    assert found == {"micro_batch_tokens", "tokens_in_flight"}


def test_a_micro_batch_is_never_wider_than_what_is_in_flight() -> None:
    for settings in candidates(around()):
        values = {**around().values, **dict(settings)}
        assert values["micro_batch_tokens"] <= values["tokens_in_flight"]
