"""Programs that torchrun would start, each with rows of its own."""

from __future__ import annotations

import os
from multiprocessing import Queue
from pathlib import Path
from typing import Any

import pytest
import torch
from deep_zoo import saved
from gather_threads import gather_policy, given, score

import forked_python
import penstock
from penstock.offload.ranks.joining import LOCAL, local_store

NUMS = (7, 0, 2)
"""The micro-batches of each rank."""


def program(rank: int, model: Any) -> list[Any]:
    """Scores them, and completes the first one by a plain call."""
    batches = given(rank, NUMS[rank])
    found: list[Any] = [float(one.double().sum()) for one in score(model, batches)]
    for ids in batches[:1]:
        tokens = model.generate(ids, max_new_tokens=2 + rank, do_sample=False)
        found.append(tokens.tolist())
    return found


def rank_main(rank: int, num: int, port: int, folder: Path, answer: Any) -> None:
    os.environ |= {
        "RANK": f"{rank}",
        "WORLD_SIZE": f"{num}",
        "MASTER_ADDR": LOCAL,
        "MASTER_PORT": f"{port}",
    }
    torch.set_num_threads(1)
    policy = gather_policy(folder, "250KiB").with_settings(["ranks=null"])
    model = penstock.load(folder, policy, ranks="gather")
    try:
        answer.put((rank, program(rank, model)))
    except BaseException as error:
        answer.put((rank, error))
        raise
    if rank != 1:  # that one leaves it to the end of the program
        penstock.unwrap(model)


@pytest.mark.slow
def test_ranks_with_uneven_rows_end_together(
    tmp_path: Path, own_processes: None
) -> None:
    torch.set_num_threads(1)
    saved("llama", tmp_path, 5)
    policy = gather_policy(tmp_path, "250KiB").with_settings(["ranks=null"])
    with penstock.load(tmp_path, policy) as model:
        wanted = {rank: program(rank, model) for rank in range(len(NUMS))}
    with_port = local_store()
    port = with_port.port
    del with_port  # the first rank takes it
    answer: Queue[Any] = forked_python.context.Queue()
    processes = [
        forked_python.context.Process(
            target=rank_main, args=(rank, len(NUMS), port, tmp_path, answer)
        )
        for rank in range(len(NUMS))
    ]
    for process in processes:
        process.start()
    found = dict(answer.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
    assert found == wanted
    assert [process.exitcode for process in processes] == [0] * len(NUMS)
