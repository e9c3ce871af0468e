"""When a user is told that reading and computing cannot overlap everywhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import penstock
from nets import WIDTH, Net
from penstock import Policy

HEAD = 8
"""Times as large as a block."""


def wide_headed() -> nn.Module:
    """Net, with a head that is several times as large as each block."""
    torch.manual_seed(0)
    net = Net(4)
    net.head = nn.Linear(WIDTH, HEAD * WIDTH)
    return net


def announced(device_memory: int) -> list[str]:
    policy = Policy(device_memory=device_memory, resident_below=1)
    model = penstock.wrap(wide_headed(), policy)
    try:
        fallbacks = penstock.statistics(model).fallbacks
    finally:
        penstock.unwrap(model)
    return [note for note in fallbacks if "no room to fetch" in note]


def block_bytes() -> int:
    return -(-4 * (WIDTH * WIDTH + WIDTH) // 4096) * 4096


def head_bytes() -> int:
    return -(-4 * HEAD * (WIDTH * WIDTH + WIDTH) // 4096) * 4096


def test_a_large_head_beside_one_block_is_room_enough() -> None:
    """Two of the largest part are never there at one time: it has no such neighbour."""
    assert not announced(head_bytes() + block_bytes() + 4096)


def test_a_part_that_has_no_room_beside_its_neighbour_is_announced(
    caplog: pytest.LogCaptureFixture,
) -> None:
    (note,) = announced(head_bytes() + 4096)
    assert "would overlap" in note
    assert note in caplog.text
