"""Simulated sweeps: what real ones decide, times worked out by hand, and what holds
whatever is simulated."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import penstock
from nets import Net, batches, make
from nets import streamed as streamed_net
from penstock.io.errors import DoesNotFitError
from penstock.io.weights.load import Load
from penstock.offload.engine.tiers import Tiers
from penstock.offload.model import engine_of
from penstock.scheduler.placement import spread
from penstock.scheduler.simulation.rehearsal import Passes, rehearse
from penstock.scheduler.simulation.simulate import Simulation, simulate
from penstock.scheduler.simulation.simulated import Rank, SimulatedLink, Traffic

LINK = SimulatedLink(bytes_per_second=10.0)


def streamed(num: int, **values: Any) -> Rank:
    """Units of ten bytes, none of which stays, in two slots; each of them takes a
    second over the link, and two micro-batches a second each in it."""
    settings: dict[str, Any] = {
        "sizes": [10] * num,
        "tiers": ["host"] * num,
        "routes": {"host": ["link"]},
        "capacity": 20,
        "compute_seconds": 1.0,
        "lookahead": 1,
    }
    return Rank(**{**settings, **values})


def run(
    rank: Rank,
    links: Mapping[str, SimulatedLink] | None = None,
    *,
    num_micro_batches: int = 2,
    num_passes: int = 2,
) -> Simulation:
    return simulate(
        [rank],
        {"link": LINK, **(links or {})},
        num_micro_batches=num_micro_batches,
        num_passes=num_passes,
    )


# What is decided is what a real sweep decides.


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("lookahead", range(4))
@pytest.mark.parametrize("slots", [2, 3, 5])
@pytest.mark.parametrize(
    ("num_blocks", "passes"),
    [
        (2, Passes(3, each=3)),
        (8, Passes(3, each=3)),
        (5, Passes(4, each=1)),
        (5, Passes(4, each=2)),
        (5, Passes(3, each=3, before=2)),
        (8, Passes(2, each=1, before=1)),
    ],
    ids=str,
)
def test_units_are_loaded_in_the_order_of_a_real_sweep(
    num_blocks: int,
    passes: Passes,
    slots: int,
    lookahead: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[int] = []
    load: Callable[..., Load] = Tiers.load

    def noted(self: Tiers, unit: int, offset: int, after: Any) -> Load:
        loaded.append(unit)
        return load(self, unit, offset, after)

    monkeypatch.setattr(Tiers, "load", noted)
    net = make(Net, num_blocks)
    with streamed_net(net, slots=slots, lookahead=lookahead):
        engine = engine_of(net)
        sites = range(len(engine.model_division.sites))
        order = [unit for i in sites for unit in engine._binding.units_of_site(i)]
        assert len(order) == len(sites) == num_blocks + 2
        placement = engine._tiers.placement
        capacity = engine.statistics().device_memory_bytes

        def run_passes(num: int) -> Callable[[Any], None]:
            def run(x: Any) -> None:
                for _ in range(num):
                    net(x)

            return run

        with penstock.sweep(net, width=2) as sweep:
            if passes.before:
                sweep.map(run_passes(passes.before), batches(2))
            sweep.map(run_passes(passes.each), batches(2 * passes.num // passes.each))
    schedule = rehearse(
        [engine._tiers._transfers[unit].nbytes for unit in order],
        staying=frozenset(i for i, u in enumerate(order) if placement[u] == "device"),
        capacity=capacity,
        lookahead=lookahead,
        passes=passes,
    )
    assert [order[load.unit] for load in schedule.loads] == loaded
    assert len(loaded) >= len(order)


def test_a_slot_is_not_refilled_before_the_visit_that_reads_it_is_over() -> None:
    for num in range(2, 12):
        for slots in range(2, 6):
            schedule = rehearse(
                [10] * num,
                staying=frozenset(),
                capacity=10 * slots,
                lookahead=slots - 1,
                passes=Passes(3, each=3),
            )
            for visit, need in enumerate(schedule.needs):
                load = schedule.loads[need]
                assert load.unit == visit % num
                assert load.tick <= 2 * visit
                assert 2 * (load.after + 1) <= load.tick


def test_a_working_set_that_is_too_small_is_refused() -> None:
    with pytest.raises(DoesNotFitError, match="device_memory"):
        run(streamed(3, capacity=9))


# Times worked out by hand.


def test_two_slots_overlap_loading_and_computing() -> None:
    """Loads take 1 s, visits 2 s. The first pass does not know yet what follows the
    last unit, which costs the load of unit 0 once: 7 to 8."""
    found = run(streamed(3))
    assert found.visits.opened.tolist() == [1, 3, 5, 8, 10, 12]
    assert found.visits.ended.tolist() == [3, 5, 7, 10, 12, 14]
    assert [(t.unit, t.begin, t.end) for t in found.transfers] == [
        (0, 0, 1),
        (1, 1, 2),
        (2, 3, 4),
        (0, 7, 8),
        (2, 10, 11),
        (0, 12, 13),
    ]
    assert found.makespan_seconds == 14
    assert found.weight_wait_seconds.tolist() == [2]
    assert found.compute_seconds.tolist() == [12]
    assert found.link_bytes == {"link": 60}
    assert found.pass_ends.tolist() == [[7, 14]]
    assert found.steady_pass_seconds == 7


def test_who_is_to_be_replaced_is_known_to_begin_anew() -> None:
    """Scoring: others begin when the first have ended, so unit 0 is fetched during the
    visit of unit 2, 5 to 6."""
    found = simulate(
        [streamed(3)], {"link": LINK}, num_micro_batches=2, num_passes=2, passes_each=1
    )
    assert found.visits.opened.tolist() == [1, 3, 5, 7, 9, 11]
    with pytest.raises(ValueError, match="at least one pass"):
        Passes(0, each=1)


def test_a_sweep_before_leaves_what_is_in_the_slots() -> None:
    """Units 1 and 2; and does not know that another one comes."""
    rank = streamed(3)
    shape = {"num_micro_batches": 2, "passes_before": 1}
    found = simulate([rank], {"link": LINK}, num_passes=1, **shape)
    assert found.visits.opened.tolist() == [1, 3, 5, 8, 10, 12]
    assert found.steady_pass_seconds == 7


def test_a_slow_link_is_waited_for() -> None:
    """Three units stream through two slots: 4 s a load, 2 s a visit."""
    found = run(
        streamed(3), {"link": SimulatedLink(bytes_per_second=2.5)}, num_passes=1
    )
    assert found.visits.opened.tolist() == [4, 8, 12]
    assert found.visits.ended.tolist() == [6, 10, 14]


def test_what_runs_ahead_fetches_as_soon_as_a_slot_is_free() -> None:
    """Unit 1 comes over another link until 8. Unit 2 takes the slot of unit 0 when that
    has run, 6 to 10; else once unit 1 is there, 8 to 12."""
    tiers, ways = ["host", "other", "host"], {"host": ["link"], "other": ["second"]}
    links = {
        "link": SimulatedLink(bytes_per_second=2.5),
        "second": SimulatedLink(bytes_per_second=1.25),
    }
    rank = streamed(3, tiers=tiers, routes=ways, runs_ahead=True)
    assert run(rank, num_passes=1, links=links).visits.opened.tolist() == [4, 8, 10]
    rank = streamed(3, tiers=tiers, routes=ways)
    assert run(rank, num_passes=1, links=links).visits.opened.tolist() == [4, 8, 12]


def test_latency_makes_a_unit_late_but_keeps_no_link_busy() -> None:
    late = SimulatedLink(bytes_per_second=10.0, latency_seconds=0.5)
    found = run(streamed(2), {"link": late}, num_passes=1)
    assert found.visits.opened.tolist() == [1.5, 3.5]
    assert found.link_busy_seconds == {"link": 2}


def test_a_way_over_two_links_takes_one_after_the_other() -> None:
    rank = streamed(2, routes={"host": ["drive", "link"]})
    found = run(rank, {"drive": SimulatedLink(bytes_per_second=5.0)}, num_passes=1)
    assert [(t.link, t.unit, t.begin, t.end) for t in found.transfers] == [
        ("drive", 0, 0, 2),
        ("drive", 1, 2, 4),
        ("link", 0, 2, 3),
        ("link", 1, 4, 5),
    ]
    assert found.visits.opened.tolist() == [3, 5]


def test_what_stays_is_there_or_comes_once() -> None:
    rank = streamed(2, tiers=["device", "device"])
    assert run(rank).visits.opened.tolist() == [0, 2, 4, 6]
    routes = {"device": ["link"]}
    found = run(streamed(2, tiers=["device", "device"], routes=routes))
    assert found.visits.opened.tolist() == [1, 3, 5, 7]
    assert found.link_bytes == {"link": 20}


def test_two_devices_share_a_link_in_turns() -> None:
    """Each alone: see above. The loads of the first come before those of the second."""
    rank = streamed(2)
    found = simulate([rank] * 2, {"link": LINK}, num_micro_batches=2, num_passes=1)
    assert [(t.rank, t.unit, t.begin) for t in found.transfers] == [
        (0, 0, 0),
        (0, 1, 1),
        (1, 0, 2),
        (1, 1, 3),
    ]
    assert found.visits.opened.tolist() == [1, 3, 3, 5]
    assert found.pass_ends.tolist() == [[5], [7]]


def kv_rank(bytes_in: Any, bytes_out: Any, **values: Any) -> Rank:
    kv = Traffic(link_in="in", link_out="out", bytes_in=bytes_in, bytes_out=bytes_out)
    return streamed(1, tiers=["device"], kv=kv, **values)


def test_keys_and_values_come_one_micro_batch_ahead() -> None:
    """They take 2 s, computing 1 s: micro-batches begin at 2, 4, 6, and those of the
    next pass are asked for at 6."""
    rank = kv_rank(20, 0)
    found = run(rank, num_micro_batches=3, links={"in": LINK, "out": LINK})
    assert found.visits.began.tolist() == [2, 8]
    assert found.visits.ended.tolist() == [7, 13]
    assert found.kv_wait_seconds.tolist() == [(7 - 3) + (13 - 7 - 3)]
    assert found.link_bytes == {"link": 0, "in": 120, "out": 0}


def test_what_is_written_back_is_there_before_it_is_read_again() -> None:
    """The next pass asks for them at 7, when the last ones have been written."""
    rank = kv_rank(20, 10)
    found = run(rank, num_micro_batches=3, links={"in": LINK, "out": LINK})
    assert found.visits.began.tolist() == [2, 9]
    slow = SimulatedLink(bytes_per_second=2.0)  # 15 s for what three write
    found = run(rank, num_micro_batches=3, links={"in": LINK, "out": slow})
    assert found.visits.began.tolist() == [2, 2 + 15 + 2]


def test_micro_batches_and_passes_may_differ() -> None:
    """Computing 1, 2, 3 s; keys and values none in the first pass, then 4 s each."""
    sizes = np.array([0.0, 40.0]).reshape(2, 1, 1)
    rank = kv_rank(sizes, 0, compute_seconds=[1.0, 2.0, 3.0])
    found = run(rank, num_micro_batches=3, links={"in": LINK, "out": LINK})
    assert found.visits.began.tolist() == [0, 3 + 4]
    assert found.visits.ended.tolist() == [6, 7 + 4 + 4 + 3]


def test_keys_and_values_go_before_weights_on_a_shared_link() -> None:
    """The keys and values of the second micro-batch and of the next unit's first one, 1
    s each."""
    kv = Traffic(link_in="link", link_out="link", bytes_in=10, bytes_out=0)
    found = run(streamed(2, kv=kv), num_passes=1)
    assert found.link_bytes == {"link": 2 * 10 + 2 * 2 * 10}
    assert found.link_busy_seconds["link"] == 6
    assert found.drained_seconds >= 6


# The ceiling of a link, and of computing.

FACTORS = (4.0, 1.0, 0.5, 0.25)


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("slots", [3, 4])
@pytest.mark.parametrize("num_units", [12, 13, 24, 33, 80, 126])
@pytest.mark.parametrize("factor", FACTORS)
def test_half_behind_a_slow_link_takes_what_the_formula_says(
    factor: float, num_units: int, slots: int, runs_ahead: bool
) -> None:
    """`L max(t_c, f W / B)` to within 1 %, for a link of B = factor W / t_c, where f is
    counted: what fits stays in the slots from pass to pass."""
    nbytes, compute, passes = 1000, 3.0, 5
    away = num_units // 2
    stay = spread([nbytes] * num_units, nbytes * (num_units - away))
    rank = Rank(
        sizes=[nbytes] * num_units,
        tiers=["device" if u in stay else "host" for u in range(num_units)],
        routes={"host": ["link"]},
        capacity=nbytes * (len(stay) + slots),
        compute_seconds=compute / 4,
        runs_ahead=runs_ahead,
    )
    speed = factor * nbytes / compute
    link = SimulatedLink(bytes_per_second=speed)
    found = run(rank, {"link": link}, num_micro_batches=4, num_passes=passes)
    first, last = found.pass_ends[0, 0], found.pass_ends[0, -1]
    busy = sum(
        max(0.0, min(t.end, last) - max(t.begin, first)) for t in found.transfers
    )
    share = busy * speed / nbytes / (passes - 1) / num_units
    expected = num_units * max(compute, share * nbytes / speed)
    assert found.steady_pass_seconds == pytest.approx(expected, rel=0.01)
    if num_units >= 80 and slots == 3:  # what stays in those is little of that
        expected = num_units * max(compute, away / num_units * nbytes / speed)
        assert found.steady_pass_seconds == pytest.approx(expected, rel=0.01)


# What holds whatever is simulated.


@st.composite
def cases(draw: st.DrawFn) -> tuple[Rank, dict[str, SimulatedLink], int, int]:
    num = draw(st.integers(1, 9))
    sizes = draw(st.lists(st.integers(1, 50), min_size=num, max_size=num))
    tiers = draw(
        st.lists(st.sampled_from(["device", "a", "b"]), min_size=num, max_size=num)
    )
    staying = sum(n for n, tier in zip(sizes, tiers, strict=True) if tier == "device")
    passes, micro_batches = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    speeds = st.floats(0.5, 100)
    latency = st.sampled_from([0.0, 0.25])
    links = {
        name: SimulatedLink(
            bytes_per_second=draw(speeds), latency_seconds=draw(latency)
        )
        for name in ("x", "y", "z")
    }
    kv = None
    if draw(st.booleans()):
        shape = (passes, num, micro_batches)
        numbers = st.integers(0, 20)
        found = [draw(st.lists(numbers, min_size=1, max_size=4)) for _ in range(2)]
        into, outof = (np.resize(np.array(f, dtype=float), shape) for f in found)
        ways = st.sampled_from(["x", "y", "z"])
        kv = Traffic(
            link_in=draw(ways), link_out=draw(ways), bytes_in=into, bytes_out=outof
        )
    rank = Rank(
        sizes=sizes,
        tiers=tiers,
        capacity=staying + draw(st.integers(1, 3)) * max(sizes),
        compute_seconds=draw(st.floats(0.1, 3)),
        routes={
            "a": ["x"],
            "b": ["y", "x"],
            **draw(st.sampled_from([{}, {"device": ["y"]}])),
        },
        lookahead=draw(st.integers(0, 4)),
        kv=kv,
        runs_ahead=draw(st.booleans()),
    )
    return rank, links, micro_batches, passes


@given(case=cases())
def test_time_and_bytes_are_conserved(case: Any) -> None:
    rank, links, micro_batches, passes = case
    found = simulate([rank], links, num_micro_batches=micro_batches, num_passes=passes)
    spent = found.compute_seconds + found.weight_wait_seconds + found.kv_wait_seconds
    assert spent.tolist() == pytest.approx([found.makespan_seconds])
    schedule = rehearse(
        rank.sizes,
        staying=frozenset(u for u, tier in enumerate(rank.tiers) if tier == "device"),
        capacity=rank.capacity,
        lookahead=rank.lookahead,
        passes=Passes(passes, each=passes),
    )
    expected = dict.fromkeys(links, 0.0)
    for load in schedule.loads:
        for name in rank.routes.get(rank.tiers[load.unit], ()):
            expected[name] += rank.sizes[load.unit]
    if rank.kv is not None:
        expected[rank.kv.link_in] += float(np.sum(rank.kv.bytes_in))
        expected[rank.kv.link_out] += float(np.sum(rank.kv.bytes_out))
    assert found.link_bytes == pytest.approx(expected)
    for name, link in links.items():
        busy = found.link_busy_seconds[name]
        assert busy == pytest.approx(expected[name] / link.bytes_per_second)
        assert busy <= found.drained_seconds * (1 + 1e-9)
    visits = found.visits
    assert np.all(visits.opened <= visits.began)
    assert np.all(visits.began < visits.ended)
    assert np.all(visits.ended[:-1] <= visits.opened[1:])


@given(case=cases(), name=st.sampled_from("xyz"), times=st.floats(1, 20))
def test_a_faster_link_is_never_slower(case: Any, name: str, times: float) -> None:
    rank, links, micro_batches, passes = case
    shape = {"num_micro_batches": micro_batches, "num_passes": passes}
    before = simulate([rank], links, **shape)
    faster = SimulatedLink(
        bytes_per_second=times * links[name].bytes_per_second,
        latency_seconds=links[name].latency_seconds,
    )
    after = simulate([rank], {**links, name: faster}, **shape)
    assert after.makespan_seconds <= before.makespan_seconds * (1 + 1e-9)


def test_devices_that_share_nothing_are_as_fast_as_one() -> None:
    links = {f"link{n}": LINK for n in range(50)}
    ranks = [streamed(4, routes={"host": [name]}) for name in links]
    found = simulate(ranks, links, num_micro_batches=2, num_passes=3)
    alone = run(streamed(4), num_passes=3)
    assert set(found.pass_ends[:, -1]) == {alone.makespan_seconds}
    assert set(found.link_bytes.values()) == {alone.link_bytes["link"]}


def test_a_link_that_many_share_is_each_ones_for_a_part_of_the_time() -> None:
    ranks = [streamed(6, lookahead=1)] * 20
    found = simulate(ranks, {"link": LINK}, num_micro_batches=2, num_passes=3)
    moved = found.link_bytes["link"]
    assert found.drained_seconds == pytest.approx(moved / LINK.bytes_per_second)


def test_micro_batches_make_no_events() -> None:
    """A visit is one event, and a load one for each link, whoever runs through it."""
    rank = streamed(40, tiers=["host", "device"] * 20, capacity=10 * 23)
    found = [run(rank, num_micro_batches=n, num_passes=4) for n in (1, 1024)]
    assert found[0].num_events == found[1].num_events
    assert found[0].num_events <= 40 * 4 + len(found[0].transfers) + 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tiers": ["host"]}, "2 units have 1 tiers"),
        ({"routes": {}}, "there is no route from host"),
        ({"routes": {"host": ["other"]}}, "there is no link other"),
    ],
)
def test_what_cannot_be_simulated_is_named(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(streamed(2, **values))


def test_links_that_move_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="moves nothing"):
        SimulatedLink(bytes_per_second=0)
    with pytest.raises(ValueError, match="one pass alone is not steady"):
        _ = run(streamed(2), num_passes=1).steady_pass_seconds


def test_a_simulation_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from penstock.scheduler.simulation.simulate import Rank, simulate\n"
        "r = Rank(sizes=[1], tiers=['device'], capacity=1, compute_seconds=2.0)\n"
        "s = simulate([r], {}, num_micro_batches=3, num_passes=2)\n"
        "print(s.makespan_seconds)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("12.0", "")
