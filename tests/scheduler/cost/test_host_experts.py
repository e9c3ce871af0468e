"""From how many tokens on an expert is loaded rather than computed by the CPU."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from penstock.io.tier import Tier
from penstock.scheduler.cost.host_experts import ExpertUnit, HostRates, least_tokens
from penstock.scheduler.cost.rates import Curve, Rates
from penstock.scheduler.cost.shape import UnitCost

NBYTES = 50_000_000
UNIT = ExpertUnit(
    UnitCost("expert", (0,), NBYTES, NBYTES),
    num_experts=1,
    hidden_bytes=2 * 4096,
    itemsize=2,
)
FLAT = Curve.of({1: 2e12})


def rates(link: float = 25e9, cast: float = math.inf, int8: float = 1e9) -> Rates:
    return Rates(
        matmul_flops=Curve.of({1: 1e14}),
        attention_flops=Curve.of({1: 1e14}),
        device_bytes=1e12,
        pointwise_bytes=1e12,
        decode_bytes=1e12,
        links={Tier.DISK: 3e9, Tier.HOST: link},
        crosses_host=True,
        out_bytes=link,
        cast_bytes=cast,
        decoding={"int8": int8},
    )


def test_the_number_is_flops_by_link() -> None:
    """2 TFLOP/s and 25 GB/s: 80 tokens, with 16 bits a weight; moving hidden states
    costs two of them."""
    host = HostRates(FLAT, 200e9)
    free = replace(UNIT, hidden_bytes=0)
    assert least_tokens(free, rates(), host) == 80
    assert least_tokens(UNIT, rates(), host) == 78
    assert least_tokens(free, rates(link=50e9), host) == 40
    assert least_tokens(free, rates(), HostRates(Curve.of({1: 1e12}), 200e9)) == 40


def test_memory_slower_than_the_link_computes_none() -> None:
    assert least_tokens(UNIT, rates(), HostRates(FLAT, 20e9)) == 1


def test_experts_that_are_loaded_together_count_on_average() -> None:
    host = HostRates(FLAT, 200e9)
    four = replace(
        UNIT, unit=UnitCost("four", (0,), 4 * NBYTES, 4 * NBYTES), num_experts=4
    )
    assert least_tokens(four, rates(), host) == least_tokens(UNIT, rates(), host)


def test_decoding_counts() -> None:
    """A stored half crosses the link in half of the time, and is decoded by one thread
    each time that the CPU computes it."""
    decoded = UnitCost("coded", (0,), NBYTES // 2, NBYTES, (("int8", NBYTES // 2),))
    coded = replace(UNIT, unit=decoded, kept=NBYTES // 2)
    fast, slow = (
        least_tokens(coded, rates(cast=1e9, int8=speed), HostRates(FLAT, 200e9))
        for speed in (100e9, 10e9)
    )
    assert 1 < fast < 40
    assert slow == 1


@given(
    link=st.floats(1e9, 1e11),
    memory=st.floats(1e9, 1e12),
    low=st.floats(1e9, 1e12),
    rise=st.floats(1, 400),
)
def test_below_the_number_the_cpu_is_faster(
    link: float, memory: float, low: float, rise: float
) -> None:
    host = HostRates(Curve.of({1: low, 512: low * rise}), memory)
    found = rates(link=link)
    num = least_tokens(UNIT, found, host)
    loading = UNIT.load_seconds(found)
    assert num == 1 << 20 or UNIT.host_seconds(num, found, host) >= loading
    if num > 1:
        assert UNIT.host_seconds(num - 1, found, host) < loading
    assert math.isfinite(loading)
