"""Rows of embedding tables that are read from the file."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import penstock
from penstock import Policy

pytestmark = pytest.mark.usefixtures("no_leaks")


class Table(nn.Module):
    """An embedding of 1 MiB, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(4096, 64), nn.Linear(64, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.layer(self.embedding(ids)))


def test_threads_that_look_up_rows_at_once_get_their_own(tmp_path: Path) -> None:
    made = torch.Generator().manual_seed(0)
    inputs = [torch.randint(4096, (9,), generator=made) for _ in "1234"]
    net: Any = Table().requires_grad_(False)
    begin = threading.Barrier(len(inputs))
    wanted = [net.embedding(ids) for ids in inputs]
    policy = Policy(device_memory=64 << 10, gather_rows=1 << 20, io={"cache": tmp_path})
    with penstock.wrap(net, policy) as model:

        def look_up(index: int) -> list[bool]:
            begin.wait()
            found = (model.embedding(inputs[index]) for _ in range(40))
            return [torch.equal(rows, wanted[index]) for rows in found]

        with ThreadPoolExecutor(len(inputs)) as pool:
            right = list(pool.map(look_up, range(len(inputs))))
        assert penstock.statistics(model).bytes_gathered
    assert all(map(all, right))
