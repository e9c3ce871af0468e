"""Layer buffers of every tier, against tensors that are concatenated."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

import penstock
import zoo
from nets import same
from penstock import Policy
from penstock.io.devices.device import CpuDevice
from penstock.io.errors import ClosedError, DoesNotFitError, OutputError, ReadError
from penstock.io.fallbacks import Fallbacks
from penstock.io.kv import file as kv_file
from penstock.io.kv import staging as kv_staging
from penstock.io.kv.buffer_pool import UnpinnedPool
from penstock.io.kv.codec import Plain
from penstock.io.kv.count import KvCount
from penstock.io.kv.file import KvFile
from penstock.io.kv.host_bounce import NoBounce
from penstock.io.kv.pages import PAGE_BYTES
from penstock.io.kv.shape import KvShape
from penstock.io.kv.staging import Staging
from penstock.io.kv.tiers import CopiedTier, DiskTier, InPlaceTier
from penstock.io.kv.worker_stream import WorkerStream
from penstock.scheduler.kv.budget import KvBudget
from penstock.scheduler.kv.store import KvLease, KvStore, KvTier

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture(autouse=True)
def few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models' keys and values would all stay staged."""
    monkeypatch.setattr(kv_staging, "FEW_BYTES", 0)


KINDS = ["in place", "copied", "disk"]


def file_in(folder: Path, *, direct: bool = True) -> KvFile:
    return KvFile(
        folder,
        direct=direct,
        max_pending_bytes=1 << 20,
        write_pace=None,
        read_pace=None,
    )


@contextlib.contextmanager
def tier_of(kind: str, folder: Path) -> Iterator[tuple[Any, KvCount, Staging]]:
    device, count = CpuDevice(), KvCount()
    with contextlib.ExitStack() as opened:
        staging = opened.enter_context(Staging(device, None))
        tier: Any
        if kind == "in place":
            tier = InPlaceTier(torch.device("cpu"), count)
        elif kind == "copied":
            out, back = (
                opened.enter_context(WorkerStream(name, max_pending_bytes=1 << 20))
                for name in ("kv-out", "kv-back")
            )
            tier = CopiedTier(
                device,
                staging,
                count,
                Plain,
                out=out,
                back=back,
                pool=UnpinnedPool(),
            )
        else:
            tier = DiskTier(
                device, staging, count, Plain, partial(file_in, folder), NoBounce()
            )
        opened.enter_context(tier)
        yield tier, count, staging


def lease_of(nbytes: int) -> KvLease:
    budget = KvBudget(("host",), {"host": 1 << 40})
    budget.take({"host": nbytes})
    return KvLease(budget, "host", nbytes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(20))
def test_a_buffer_holds_what_was_appended(kind: str, seed: int, tmp_path: Path) -> None:
    random, generator = Random(seed), torch.Generator().manual_seed(seed)
    rows, heads = random.choice([(1, 2), (7, 3), (32, 4), (129, 5)])
    dims = random.choice([(8, 8), (24, 16)])
    dtype = random.choice([torch.float32, torch.bfloat16])

    def tokens(num: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (
            torch.randn(rows, heads, num, dim, generator=generator).to(dtype)
            for dim in dims
        )
        return keys, values

    with tier_of(kind, tmp_path) as (tier, count, staging), torch.inference_mode():
        shape = KvShape.of(*tokens(1, rows))
        capacity = random.choice([1, 40, 200])
        buffer = tier.open(shape, capacity, lease_of(0))
        model = list(tokens(0, rows))
        first = 0
        for _ in range(40):
            act = random.choice(["append"] * 8 + ["truncate", "select", "forget"])
            length = first + model[0].shape[2]
            if act == "append":
                new = tokens(random.choice([1, 1, 1, 2, 17]), rows)
                model = [torch.cat([o, n], 2) for o, n in zip(model, new, strict=True)]
                start = random.choice([first, random.randint(first, length)])
                found = buffer.append(*new, start)
                assert same([m[:, :, start - first :] for m in model], list(found))
            elif act == "truncate":
                kept = random.randint(first, length)
                buffer.truncate(kept)
                model = [m[:, :, : kept - first] for m in model]
            elif act == "forget":
                first, before = random.randint(first, length), first
                buffer.forget(first)
                model = [m[:, :, first - before :] for m in model]
            elif length > first:
                chosen = torch.randint(rows, (rows,), generator=generator)
                if rows > 1 and random.random() < 0.3:
                    chosen = chosen[: rows // 2]
                buffer.select(chosen)
                rows, model = chosen.shape[0], [m[chosen] for m in model]
            if random.random() < 0.3:
                buffer.prefetch()
            assert buffer.length == first + model[0].shape[2]
        assert same(list(buffer.view(first)), model)
        buffer.close()
        buffer.close()
        with pytest.raises(ClosedError):
            buffer.view(first)
    assert staging.peak_bytes == 0 or kind != "in place"
    assert sum(count.written.values()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_only_see_themselves_are_seen_later(
    kind: str, tmp_path: Path
) -> None:
    """Also when what came before has to move for them."""
    with tier_of(kind, tmp_path) as (tier, _, _):
        shape = KvShape(512, 1, 4, 1, 4, torch.float32)  # a row fills a page
        buffer = tier.open(shape, 2, lease_of(0))
        tokens = [torch.full((512, 1, 1, 4), float(n)) for n in range(4)]
        for token in tokens[:2]:
            buffer.append(token, token, 0)
        buffer.forget(1)
        buffer.append(tokens[2], tokens[2], 2)
        keys, values = buffer.append(tokens[3], tokens[3], 1)
        assert torch.equal(keys, torch.cat(tokens[1:], 2))
        assert torch.equal(values, keys)


def test_what_is_viewed_still_is_not_overwritten(tmp_path: Path) -> None:
    """Later layers of a model may read what an earlier one read."""
    with tier_of("copied", tmp_path) as (tier, _, staging):
        shape = KvShape(1, 1, 4, 1, 4, torch.float32)
        buffers = [tier.open(shape, 16, lease_of(0)) for _ in range(8)]
        one = torch.ones(1, 1, 1, 4)
        seen: list[torch.Tensor] = []
        for _ in range(2):
            for number, buffer in enumerate(buffers):
                seen = seen[-8:]
                seen.append(buffer.append(number * one, number * one, 0)[0])
        for number in range(8):
            assert torch.equal(seen[number + 1], torch.full((1, 1, 2, 4), number))
        del seen
        assert len(staging._staged) <= 3


def test_a_buffer_that_was_viewed_when_it_was_dropped_goes_with_who_views_it() -> None:
    """For instance, a micro-batch waits for others after its attention. What the
    buffers know of their staged rows keeps no memory."""
    with Staging(CpuDevice(), None) as staging:
        known, views = [], []
        for _ in range(50):
            staged = staging.lend(5_000, 0, 0, ahead=False)
            assert staged is not None
            staging.use(staged)
            known.append(staged)
            views.append(staged.buffer[:8])
        kept = [staged for staged in known if staged.buffer.nbytes]
        assert len(kept) <= 4
        assert all(staged.is_dropped for staged in known[:-3])


def test_the_memory_of_what_was_read_is_used_again_unless_somebody_looks_at_it() -> (
    None
):
    with Staging(CpuDevice(), 1000) as staging:
        one = staging.lend(800, 0, 0, ahead=False)
        assert one is not None
        staging.use(one)
        view, address = one.buffer[:8], one.buffer.data_ptr()
        assert staging.lend(800, 0, 0, ahead=True) is None  # it can wait
        del view
        two = staging.lend(800, 0, 0, ahead=True)
        assert two is not None
        assert two.buffer.data_ptr() == address


def test_more_than_a_few_strips_have_room_in_a_few_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kv_staging, "FEW_BYTES", 5 * 900)
    with Staging(CpuDevice(), None) as staging:
        lent = [staging.lend(800, 0, 0, ahead=True) for _ in range(6)]
        assert [staged is not None for staged in lent] == [True] * 5 + [False]


def test_what_is_needed_now_takes_the_place_of_what_came_last() -> None:
    with Staging(CpuDevice(), None) as staging:
        lent = [staging.lend(8, 0, 0, ahead=True) for _ in range(3)]
        assert staging.lend(8, 0, 0, ahead=False) is not None
        assert [staged and staged.is_dropped for staged in lent] == [False, False, True]


def test_no_more_is_staged_than_was_said(tmp_path: Path) -> None:
    with contextlib.ExitStack() as opened:
        staging = opened.enter_context(Staging(CpuDevice(), 1000))
        one = staging.lend(600, 0, 0, ahead=False)
        assert one is not None
        assert staging.lend(600, 0, 0, ahead=True) is None  # one is yet to be used
        staging.use(one)
        assert staging.lend(600, 0, 0, ahead=True) is not None
        assert one.is_dropped
        assert staging.lend(5000, 0, 0, ahead=False) is not None  # who computes must


# On disk.


def test_the_file_has_no_name_and_shrinks_to_nothing(tmp_path: Path) -> None:
    with tier_of("disk", tmp_path) as (tier, _, _):
        shape = KvShape(64, 4, 64, 4, 64, torch.float32)
        buffers = [tier.open(shape, 8, lease_of(0)) for _ in range(3)]
        new = torch.ones(64, 4, 8, 64)
        for buffer in buffers:
            buffer.append(new, new, 0)
        file = tier.file
        file.writer.give(lambda: None).wait()
        size = os.fstat(file._descriptor).st_size
        assert size == 3 * 8 * shape.row_bytes
        assert list(tmp_path.iterdir()) == []
        buffers[0].close()
        buffers[2].close()
        file.writer.give(lambda: None).wait()
        assert os.fstat(file._descriptor).st_size == 2 * size // 3
        again = tier.open(shape, 8, lease_of(0))  # in the gap
        assert file.nbytes == 2 * size // 3
        again.close()
        buffers[1].close()
        file.writer.give(lambda: None).wait()
        assert os.fstat(file._descriptor).st_size == 0


class Full:
    """A disk that takes so many bytes, once."""

    def __init__(self, nbytes: int) -> None:
        self.left = nbytes
        self.pwritev = os.pwritev
        self.has_failed = False

    def __call__(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        self.left -= sum(len(buffer) for buffer in buffers)
        if self.left < 0 and not self.has_failed:
            self.has_failed = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.pwritev(descriptor, buffers, offset)


def big_rows() -> list[dict[str, torch.Tensor]]:
    """Prompts whose keys and values fill pages."""
    return [zoo.inputs("llama", seed=seed, rows=48, tokens=24) for seed in range(4)]


def disk_policy(folder: Path) -> Policy:
    settings: dict[str, Any] = {"device_memory": "2MiB", "resident_below": 1}
    settings["io"] = {"cache": folder / "cache"}
    return Policy(**settings, kv={"tier": "disk"})


def test_generate_from_disk_is_bit_identical_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    zoo.save_checkpoint("llama", tmp_path)
    alone = zoo.load("llama", tmp_path)
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    items = big_rows()
    expected = [alone.generate(**item, **how) for item in items]
    with penstock.load(tmp_path, disk_policy(tmp_path)) as model:
        with penstock.sweep(model) as sweep:
            found = sweep.map(lambda item: model.generate(**item, **how), items)
        assert same(found, expected)
        assert torch.equal(model.generate(**items[0], **how), expected[0])
        kv = penstock.statistics(model).kv
        assert kv.bytes_written["disk"] > 10 * PAGE_BYTES
        assert kv.bytes_read["disk"] > kv.bytes_written["disk"]
        gc.collect()  # an error may have kept what it came through
        assert penstock.statistics(model).kv.bytes_held == {"disk": 0}
        assert not list((tmp_path / "cache").glob("kv-*"))


def test_a_full_disk_is_the_error_of_the_micro_batch_that_needed_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.save_checkpoint("llama", tmp_path)
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    items = big_rows()
    with penstock.load(tmp_path, disk_policy(tmp_path)) as model:
        expected = [model.generate(**item, **how) for item in items]
        monkeypatch.setattr(os, "pwritev", Full(9 * PAGE_BYTES))
        with penstock.sweep(model) as sweep:
            found = sweep.map(
                lambda item: model.generate(**item, **how),
                items,
                return_exceptions=True,
            )
        failed = [o for o in found if isinstance(o, Exception)]
        assert len(failed) == 1
        assert isinstance(failed[0], OutputError)
        assert "No space left" in str(failed[0])
        assert "io.cache" in str(failed[0])
        for one, other in zip(found, expected, strict=True):
            assert one is failed[0] or torch.equal(one, other)
        gc.collect()  # what raised and what waits may refer to each other for a moment
        assert not any(penstock.statistics(model).kv.bytes_held.values())


def test_what_cannot_be_read_is_the_error_of_who_needs_it(tmp_path: Path) -> None:
    with tier_of("disk", tmp_path) as (tier, _, _):
        shape = KvShape(64, 4, 64, 4, 64, torch.float32)
        buffer = tier.open(shape, 8, lease_of(0))
        new = torch.ones(64, 4, 4, 64)
        buffer.append(new, new, 0)
        file = tier.file
        file.writer.give(lambda: os.ftruncate(file._descriptor, 0)).wait()
        buffer.prefetch()
        with pytest.raises(ReadError, match="ends before"):
            buffer.append(new, new, 0)


def test_without_direct_access_it_goes_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_file, "_open_direct", lambda name: None)
    with file_in(tmp_path) as file:
        assert file.fallback is not None
        assert "page cache" in file.fallback


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"io\.cache"):
        file_in(tmp_path / "file" / "below")


# The store.


def test_who_used_its_strip_longest_ago_gets_the_next_one_first(
    tmp_path: Path,
) -> None:
    with tier_of("copied", tmp_path) as (tier, _, _):
        tiers: dict[str, KvTier] = {"host": tier}
        with KvStore(
            KvBudget(("host",), {"host": 1 << 20}), tiers, KvCount(), Fallbacks()
        ) as store:
            shape = KvShape(1, 1, 4, 1, 4, torch.float32)
            new = torch.ones(1, 1, 1, 4)
            handles, buffers = [], dict[tuple[int, int], Any]()
            for index in range(5):
                store.begin_turn(index, ())
                handles.append(store.begin())
                for layer in (0, 1):
                    key = ("self", layer)
                    buffers[index, layer] = store.open(handles[index], key, shape, 8)
                    store.touch(handles[index], key)
                    buffers[index, layer].append(new, new, 0)
            for index in (3, 1, 4, 0, 2):
                store.touch(handles[index], ("self", 0))
            store.begin_turn(2, [0, 1, 3, 4])
            there = [index for index in range(5) if buffers[index, 1]._staged]
            assert there == [1, 3, 4]  # there is room for three


def test_who_follows_finds_its_strip_on_the_way(tmp_path: Path) -> None:
    with tier_of("copied", tmp_path) as (tier, count, _):
        tiers: dict[str, KvTier] = {"host": tier}
        store = KvStore(
            KvBudget(("host",), {"host": 1 << 20}), tiers, count, Fallbacks()
        )
        shape = KvShape(1, 1, 4, 1, 4, torch.float32)
        new = torch.ones(1, 1, 1, 4)
        buffers: dict[tuple[int, int], Any] = {}
        handles = {}
        for index in (0, 1):
            store.begin_turn(index, ())
            handles[index] = store.begin()
            for layer in (0, 1):
                key = ("self", layer)
                buffer = store.open(handles[index], key, shape, 8)
                buffers[index, layer] = buffer
                store.touch(handles[index], key)
                buffer.append(new, new, 0)
        for index in (0, 1):  # a second step, so what follows what is known
            store.begin_turn(index, ())
            store.touch(handles[index], ("self", 0))
            buffers[index, 0].append(new, new, 0)
        before = count.read["host"]
        store.begin_turn(0, [1])  # both will use their layer 1
        assert count.read["host"] == before + 2 * shape.row_bytes
        assert buffers[1, 1]._staged is not None
        buffers[0, 1].append(new, new, 0)
        buffers[1, 1].append(new, new, 0)
        assert count.read["host"] == before + 2 * shape.row_bytes
        store.end(0, failed=True)
        with pytest.raises(ClosedError):
            buffers[0, 0].view(0)
        store.close()
        with pytest.raises(ClosedError):
            buffers[1, 0].view(0)
        with pytest.raises(ClosedError):
            store.begin()


def test_what_garbage_holds_is_freed_before_no_room_is_said(tmp_path: Path) -> None:
    with tier_of("copied", tmp_path) as (tier, count, _):
        shape = KvShape(1, 1, 4, 1, 4, torch.float32)
        limits = {"host": tier.bytes_of(shape, 8)}
        with KvStore(
            KvBudget(("host",), limits), {"host": tier}, count, Fallbacks()
        ) as store:
            gc.collect()
            gc.disable()
            try:
                garbage: list[Any] = [store.open(store.begin(), ("self", 0), shape, 8)]
                garbage.append(garbage)
                del garbage
                buffer = store.open(store.begin(), ("self", 0), shape, 8)
                with pytest.raises(DoesNotFitError):
                    store.open(store.begin(), ("self", 0), shape, 8)
                assert buffer.length == 0
            finally:
                gc.enable()
