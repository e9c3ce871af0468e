"""What loading a unit costs, by how it is kept and who decodes it."""

from __future__ import annotations

import pytest

from penstock.scheduler.cost.load_cost import load_seconds, stolen_seconds
from penstock.scheduler.cost.rates import Curve, Rates
from penstock.scheduler.cost.shape import UnitCost

CURVE = Curve.of({1: 1e9})
UNIT = UnitCost("a", (0,), 250, 1000, decoded=(("cast", 50), ("int4", 200)))
"""Stored in 250 bytes, in a slot of 1000."""


def rates(**values: object) -> Rates:
    given: dict[str, object] = {
        "links": {"disk": 100.0, "host": 500.0},
        "cast_bytes": 100.0,
        "decoding": {"int4": 25.0},
        **values,
    }
    return Rates(CURVE, CURVE, 1e9, 1e9, 1e9, **given)  # type: ignore[arg-type]


def test_a_codec_takes_its_own_time() -> None:
    """200 bytes of int4 take as long as 800 that are cast."""
    assert rates().cast_like(UNIT.decoded) == 850
    assert rates(decoding={}).cast_like(UNIT.decoded) == 250


def test_from_disk_the_slower_of_link_and_decoding_binds() -> None:
    assert load_seconds(UNIT, "disk", rates()) == pytest.approx(850 / 200)
    links = {"disk": 10.0, "host": 500.0}
    assert load_seconds(UNIT, "disk", rates(links=links)) == pytest.approx(25)


def test_memory_gives_slots_or_stored_bytes_that_are_decoded_again() -> None:
    assert load_seconds(UNIT, "host", rates()) == pytest.approx(1000 / 500)
    kept = load_seconds(UNIT, "host", rates(), kept=250)
    assert kept == pytest.approx(850 / 100)  # one thread decodes
    assert stolen_seconds(UNIT, "host", rates()) == 0
    assert stolen_seconds(UNIT, "host", rates(), kept=250) == pytest.approx(8.5)


def test_an_accelerator_decodes_what_is_kept_itself() -> None:
    gpu = rates(crosses_host=True, num_cores=0)
    for tier, seconds in (("host", 250 / 500), ("disk", 250 / 100)):
        assert load_seconds(UNIT, tier, gpu, kept=250) == pytest.approx(seconds)
        assert stolen_seconds(UNIT, tier, gpu, kept=250) == 0
