"""Programs that torchrun would start: each process runs the same code."""

from __future__ import annotations

import os
from multiprocessing import Queue
from pathlib import Path
from typing import Any

import pytest
import torch
from deep_zoo import saved
from rank_threads import policy_of

import forked_python
import penstock
from penstock.io.errors import RanksError
from penstock.offload.ranks.joining import LOCAL, local_store

BATCHES = 4


def sample(model: Any) -> list[list[Any]]:
    """What a program draws and computes with `model`."""
    generator = torch.Generator().manual_seed(1)
    given = [torch.randint(8, 150, (2, 5), generator=generator) for _ in range(BATCHES)]

    def fn(ids: torch.Tensor) -> list[Any]:
        found = model.generate(ids, max_new_tokens=4, do_sample=True, top_k=20)
        logits = model(found).logits
        return [found.tolist(), float(logits.double().sum())]

    with penstock.sweep(model, seed=7) as sweep:
        return sweep.map(fn, given)


def rank_main(rank: int, num: int, port: int, folder: Path, answer: Any) -> None:
    os.environ |= {
        "RANK": f"{rank}",
        "WORLD_SIZE": f"{num}",
        "MASTER_ADDR": LOCAL,
        "MASTER_PORT": f"{port}",
    }
    torch.set_num_threads(1)
    io = {"reader": "threads", "cache": folder / "cache"}
    try:
        with penstock.load(folder, policy_of("600KiB", io=io)) as model:
            first = sample(model)
        with penstock.load(folder, policy_of("600KiB", io=io)) as model:  # once more
            answer.put((rank, [first, sample(model)]))
    except BaseException as error:
        answer.put((rank, error))


@pytest.mark.slow
@pytest.mark.parametrize("num", [2, pytest.param(3, marks=pytest.mark.whole)])
def test_a_program_gives_the_same_on_all_ranks(
    num: int, tmp_path: Path, own_processes: None
) -> None:
    saved("llama", tmp_path, 5)
    io = {"reader": "threads", "cache": tmp_path / "cache"}
    policy = policy_of("600KiB", io=io).model_copy(update={"ranks": None})
    with penstock.load(tmp_path, policy) as model:
        wanted = sample(model)
    with_port = local_store()
    port = with_port.port
    del with_port  # the first rank takes it
    answer: Queue[Any] = forked_python.context.Queue()
    processes = [
        forked_python.context.Process(
            target=rank_main, args=(rank, num, port, tmp_path, answer)
        )
        for rank in range(num)
    ]
    for process in processes:
        process.start()
    found = dict(answer.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(30)
    assert found == {rank: [wanted, wanted] for rank in range(num)}


def test_ranks_that_do_not_come_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also before they are given up, once."""
    from penstock.offload.ranks import joining

    monkeypatch.setattr(joining, "JOIN_SECONDS", 1.2)
    monkeypatch.setattr(joining, "NOTICE_SECONDS", 0.1)
    where = joining.RankEnvironment(0, 3, LOCAL, 0)
    with pytest.raises(RanksError, match="rank 0 of 3 cannot join the others"):
        joining.join(where, store=local_store())
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"waiting for ranks 1, 2 of 3 at {LOCAL}:0, for at most 1 seconds"]
