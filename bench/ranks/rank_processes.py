"""Runs a function in one process for each rank, each with a link of its own speed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

from penstock.offload.ranks.joining import LOCAL, RankEnvironment, local_store

Work = Callable[..., Any]
_SPAWN = multiprocessing.get_context("spawn")


def run_ranks(num: int, work: Work, *args: Any, seconds: float = 600.0) -> list[Any]:
    """What `work(where, *args)` returns in each of `num` processes, which compute with
    one thread each. It must be a function that a new process can import."""
    store, answer = local_store(), _SPAWN.Queue()
    processes = []
    for rank in range(num):
        where = RankEnvironment(rank, num, LOCAL, store.port, num, has_store=True)
        processes.append(_SPAWN.Process(target=_main, args=(answer, work, where, args)))
    for process in processes:
        process.start()
    found = dict(answer.get(timeout=seconds) for _ in processes)
    for process in processes:
        process.join()
    for value in found.values():
        if isinstance(value, BaseException):
            raise value
    return [found[rank] for rank in range(num)]


def _main(
    answer: Any, work: Work, where: RankEnvironment, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        answer.put((where.rank, work(where, *args)))
    except Exception as error:
        answer.put((where.rank, RuntimeError(f"rank {where.rank}: {error}")))
