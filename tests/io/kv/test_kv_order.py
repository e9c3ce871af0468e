"""On a device with streams, keys and values are where they are to be whatever order the
streams allow: a device that does its work late, at random, sees every access."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from penstock.io.fallbacks import Fallbacks
from penstock.io.kv import staging as kv_staging
from penstock.io.kv.buffer_pool import PinnedPool
from penstock.io.kv.codec import Plain
from penstock.io.kv.count import KvCount
from penstock.io.kv.file import KvFile
from penstock.io.kv.host_bounce import ThroughHost
from penstock.io.kv.shape import KvShape
from penstock.io.kv.staging import Staging
from penstock.io.kv.tiers import CopiedTier, DiskTier
from penstock.scheduler.kv.budget import KvBudget
from penstock.scheduler.kv.store import KvStore, KvTier
from recording import RecordingDevice, range_of

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture(autouse=True)
def few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models' keys and values would all stay staged."""
    monkeypatch.setattr(kv_staging, "FEW_BYTES", 0)


def pin(buffer: Any) -> None:
    """The fake locks nothing."""


class Encoded(Plain):
    """Its rows are made by work that the device sees."""

    def __init__(self, shape: KvShape, device: RecordingDevice) -> None:
        super().__init__(shape)
        self._device = device

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        rows = super().encode(keys, values)
        self._device.compute.give(lambda: None, [], [range_of(rows)], "encoding")
        return rows


def tier_of(
    kind: str, device: RecordingDevice, folder: Path, opened: contextlib.ExitStack
) -> tuple[KvTier, KvCount, Staging]:
    staging = opened.enter_context(Staging(device, None))
    count = KvCount()
    out, back = device.stream("out"), device.stream("in")
    codec = partial(Encoded, device=device)
    tier: Any
    if kind == "disk":
        open_file = partial(
            KvFile,
            folder,
            direct=True,
            max_pending_bytes=1 << 20,
            write_pace=None,
            read_pace=None,
        )
        bounce = ThroughHost(device, out, back, pin)
        tier = DiskTier(device, staging, count, codec, open_file, bounce)
    else:
        pool = PinnedPool(pin, out, back)
        tier = CopiedTier(device, staging, count, codec, out=out, back=back, pool=pool)
    return opened.enter_context(tier), count, staging


@pytest.mark.parametrize("kind", ["host", "disk"])
@pytest.mark.parametrize("seed", range(8))
def test_whatever_the_streams_do_attention_sees_what_was_appended(
    kind: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The fake keeps what is queued; on a GPU nobody views what is still to be read.
    monkeypatch.setattr(kv_staging, "_num_views", lambda tensor: 1)
    random, generator = Random(seed), torch.Generator().manual_seed(seed)
    device = RecordingDevice(random, name="cpu")
    num_layers, num_batches = [(1, 1), (1, 3), (3, 2), (4, 4)][seed % 4]
    num_steps = 30 if num_batches == 1 else 5
    rows = random.choice([1, 16, 64])
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def attend(view: torch.Tensor, expected: torch.Tensor) -> None:
        span = sum((s - 1) * t for s, t in zip(view.shape, view.stride(), strict=True))
        where = view.data_ptr(), view.data_ptr() + (span + 1) * view.itemsize

        def act() -> None:
            seen.append((view.clone(), expected))

        device.compute.give(act, [where], [], "attention")

    with contextlib.ExitStack() as opened:
        opened.callback(device.synchronize)
        tier, count, staging = tier_of(kind, device, tmp_path, opened)
        store = opened.enter_context(
            KvStore(
                KvBudget(("host",), {"host": 1 << 30}),
                {"host": tier},
                count,
                Fallbacks(),
            )
        )
        shape = KvShape(rows, 2, 8, 2, 8, torch.float32)
        handles, buffers, model = {}, dict[tuple[int, int], Any](), {}
        for step in range(num_steps):
            for layer in range(num_layers):
                for index in range(num_batches):
                    store.begin_turn(index, range(num_batches))
                    if index not in handles:
                        handles[index] = store.begin()
                    at, key = (index, layer), ("self", layer)
                    if at not in buffers:
                        buffers[at] = store.open(handles[index], key, shape, 12)
                        model[at] = torch.empty(2, rows, 2, 0, 8)
                    num = random.randint(3, 6) if step == 0 else random.choice([1, 2])
                    new = torch.randn(2, rows, 2, num, 8, generator=generator)
                    model[at] = torch.cat([model[at], new], 3)
                    store.touch(handles[index], key)
                    pair = buffers[at].append(new[0], new[1], 0)
                    for view, expected in zip(pair, model[at], strict=True):
                        attend(view, expected)
                    del pair, view
                    device.run(random.randint(0, 6))
        device.synchronize()
        assert len(staging._staged) <= 3
    assert device.problems == []
    assert len(seen) == 2 * num_steps * num_layers * num_batches
    for found, expected in seen:
        assert torch.equal(found, expected)
