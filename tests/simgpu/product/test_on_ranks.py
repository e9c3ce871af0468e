"""Models that ranks share give on simulated GPUs what one rank gives on the CPU."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rank_threads import Ranks, none_failed
from ranked_kinds import KINDS
from test_on_tasks import CASES, ROWS, SMALL, Case
from test_ranked_tasks import rows

import penstock
from checkpoint import make_checkpoint
from common.id_tokenizer import Numbers
from on_device import GPU
from penstock import Policy
from penstock.offload.ranks.tcp_post import TcpPost
from shares import shared
from sim_device import SimGpu

pytestmark = [pytest.mark.simgpu, pytest.mark.usefixtures("few_objects")]
PLACES = ((GPU, "simgpu:1"), (GPU, GPU))
"""The devices of two ranks."""
HOST = {"host_memory": "1GiB"}
MIXED = {
    **HOST,
    "device_memory": "1MiB",
    "placement": {"0": "disk", "1": "host", "3": "device"},
}
"""What one rank has beside the case's values, and the other not."""


def run(model: Any, case: Case) -> list[dict[str, Any]]:
    task = getattr(penstock, case.task)
    return list(task(model, ROWS[case.task], **case.options))


def on_ranks(
    folder: Path,
    case: Case,
    places: Sequence[str],
    own: Sequence[Mapping[str, Any]] = ({}, {}),
) -> list[list[dict[str, Any]]]:
    """What each of the ranks at `places` yields, with `own` values of the policy."""
    policies = [
        Policy(device=place, ranks="pipeline", **{**SMALL, **case.values, **values})
        for place, values in zip(places, own, strict=True)
    ]
    with Ranks(folder, len(places), policies) as ranks:
        return list(none_failed(ranks.run(lambda rank, model: run(model, case))))


KEPT = ("score", "sampling")
NAMES = [name for name in CASES if "peer" not in name and name != "sampled beams"]
"""Sampled beams draw from torch's own generators, which ranks as threads share."""
PARTS = [list(KEPT), *([name] for name in NAMES)]


@pytest.mark.parametrize("names", shared(PARTS, lambda place, _: place == 0))
def test_ranks_give_one_ranks_results(
    simgpu: SimGpu, tmp_path: Path, names: list[str]
) -> None:
    """With a device each, and on the same one; weights in other tiers on each."""
    folder = make_checkpoint(
        tmp_path / "tiny", "tiny", dtype="float32", shards_of="100KB"
    )
    different = {}
    for seed, name in enumerate(names):
        case = CASES[name]
        with penstock.load(
            folder, Policy(device="cpu", **{**SMALL, **case.values})
        ) as model:
            expected = run(model, case)
        for place, places in enumerate(PLACES):
            simgpu.schedule(seed + place)
            found = on_ranks(folder, case, places, (MIXED, HOST) if place else ({}, {}))
            if found != [expected, expected]:
                different[name, places] = (found, expected)
    assert not different


STORED = [
    ("fp8", {"experts": 16, "host_memory": "1GiB"}),
    ("mxfp4", {}),
    ("int4", {"host_memory": "1GiB"}),
    ("lossless", {"kv": {"tier": "host"}}),
    ("qwen3_moe", {"experts": 16, "host_memory": "1GiB"}),
]


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.parametrize(
    ("kind", "values"), shared(STORED, lambda _, case: case[0] == "fp8")
)
def test_what_is_stored_in_fewer_bytes_is_decoded_on_each(
    simgpu: SimGpu, tmp_path: Path, kind: str, values: dict[str, Any]
) -> None:
    """And experts in host memory are computed there, on both ranks."""
    pytest.importorskip("accelerate", reason="transformers reads FP8 only with it")
    if kind == "int4":
        pytest.importorskip("compressed_tensors")
    folder, tokenizer = KINDS[kind](tmp_path), Numbers()
    small = {**SMALL, "device_memory": "600KiB", **values}

    def work(rank: int, model: Any) -> list[Any]:
        scored = penstock.score(model, rows("text"), tokenizer=tokenizer)
        made = penstock.generate(
            model, rows("prompt"), max_new_tokens=3, tokenizer=tokenizer
        )
        return [*scored, *made]

    alone = {key: value for key, value in small.items() if key != "experts"}
    with penstock.load(folder, Policy(device="cpu", **alone)) as model:
        wanted = work(0, model)
    assert not any("error" in row for row in wanted)
    for places in PLACES:
        simgpu.schedule(1)
        policies = [Policy(device=p, ranks="pipeline", **small) for p in places]
        with Ranks(folder, 2, policies) as ranks:
            assert none_failed(ranks.run(work)) == [wanted, wanted]


def tcp_pair() -> tuple[TcpPost, TcpPost]:
    """The posts of two ranks, connected."""
    one, other = socket.socketpair()
    for each in (one, other):
        each.settimeout(60.0)
    return TcpPost(0, {1: one}), TcpPost(1, {0: other})


MANY = 3
JOBS = {"score": CASES["score"], "kv on the device": CASES["kv on the device"]}


@pytest.mark.parametrize("name", shared(list(JOBS), lambda place, _: place == 0))
def test_no_rank_waits_for_its_device(
    simgpu: SimGpu, tmp_path: Path, name: str
) -> None:
    """While it computes, but once for the last results; after the first calls, which
    are looked at."""
    folder = make_checkpoint(
        tmp_path / "tiny", "tiny", dtype="float32", shards_of="100KB"
    )
    case, few = JOBS[name], ROWS[JOBS[name].task]
    many = [{**row, "id": n} for n, row in enumerate(few * MANY)]
    policies = [
        Policy(
            device=place,
            ranks="pipeline",
            **{**SMALL, "sequences_in_flight": 8, "tokens_in_flight": 128},
            **case.values,
        )
        for place in PLACES[0]
    ]

    def work(rank: int, model: Any) -> tuple[list[dict[str, Any]], Counter[str]]:
        task = getattr(penstock, case.task)
        list(task(model, few, **case.options))
        before = simgpu.syncs(this_thread=True)
        found = list(task(model, many, **case.options))
        return found, simgpu.syncs(this_thread=True) - before

    with Ranks(folder, 2, policies, posts=tcp_pair()) as ranks:
        simgpu.schedule(1)
        found = none_failed(ranks.run(work, seconds=150.0))
    (one, _), (other, _) = found
    assert one == other
    for _, waits in found:
        del waits["covered"]
        assert waits <= Counter({"event": 1})
