"""The host tier: units read once, used where they lie, one copy for all processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import penstock
import zoo
from nets import Net, batches, make, same, serially
from penstock import Policy
from penstock.io.errors import PolicyError, ReadError
from penstock.io.memory.arena import Arena
from penstock.io.memory.shared import FOLDER
from penstock.offload.model import engine_of

pytestmark = pytest.mark.usefixtures("no_leaks")

POLICY = {"device_memory": 1 << 20, "resident_below": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    zoo.save_checkpoint("llama", path)
    return path


def logits(model: Any, seed: int = 0) -> torch.Tensor:
    with torch.inference_mode():
        found = model(**zoo.inputs("llama", seed=seed)).logits
    assert isinstance(found, torch.Tensor)
    return found


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("host_memory", [1, 100_000, "1GiB"])
def test_whatever_stays_in_host_memory_the_outputs_are_the_same(
    host_memory: int | str, shared: bool, folder: Path
) -> None:
    with penstock.load(folder, Policy(**POLICY)) as model:
        expected = logits(model)
        assert penstock.statistics(model).bytes_by_tier["host"] == 0
    policy = Policy(**POLICY, host_memory=host_memory, host_shared=shared)
    with penstock.load(folder, policy) as model:
        assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), expected)
        with penstock.sweep(model) as sweep:
            found = sweep.map(lambda seed: logits(model, seed), [0, 1, 0])
        assert torch.equal(found[0], expected)
        statistics = penstock.statistics(model)
        tiers = statistics.bytes_by_tier
        assert sum(tiers.values()) == statistics.model_bytes
        if host_memory == "1GiB":
            assert tiers["disk"] == 0
            assert statistics.bytes_loaded == 0  # nothing goes through a slot
        elif host_memory == 1:
            assert tiers["host"] == 0
        else:
            assert 0 < tiers["host"] <= 100_000
            assert tiers["device"] + tiers["disk"] > 0
        assert statistics.faults == {}


def test_a_wrapped_module_can_stay_in_host_memory() -> None:
    net = make(Net)
    expected = serially(net, batches(3))
    penstock.wrap(net, Policy(device_memory="1MiB", host_memory="1MiB"))
    try:
        assert penstock.statistics(net).bytes_by_tier["host"] > 0
        assert same(serially(net, batches(3)), expected)
    finally:
        penstock.unwrap(net)
    assert same(serially(net, batches(3)), expected)


def test_what_stays_is_read_once(folder: Path) -> None:
    policy = Policy(**POLICY, host_memory="1GiB")
    with penstock.load(folder, policy) as model:
        before = penstock.statistics(model).bytes_read
        for seed in range(3):
            logits(model, seed)
        after = penstock.statistics(model)
    assert after.bytes_read == before
    assert after.wait_seconds < 0.1


def test_an_error_while_filling_names_the_unit_and_leaves_nothing_open(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    policy = Policy(
        **POLICY, host_memory="1GiB", io={"reader": "threads", "direct": False}
    )
    with pytest.raises(ReadError, match=r"unit 'model\."):
        penstock.load(folder, policy)


def test_shared_memory_is_not_that_of_a_file_that_was_changed_in_place(
    folder: Path, tmp_path: Path
) -> None:
    """With size and mtime as they were."""
    policy = Policy(**POLICY, host_memory="1GiB", host_shared=True)
    shutil.copytree(folder, tmp_path / "copy")
    with penstock.load(tmp_path / "copy", policy) as first:
        before = logits(first)
        for path in (tmp_path / "copy").glob("*.safetensors"):
            stat = path.stat()
            with path.open("r+b") as file:
                file.seek(-4096, os.SEEK_END)
                file.write(bytes(4096))
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        with penstock.load(tmp_path / "copy", policy) as second:
            found = logits(second)
    with penstock.load(tmp_path / "copy", Policy(**POLICY)) as model:
        assert torch.equal(logits(model), found)
    assert not torch.equal(before, found)


def test_a_host_memory_that_is_no_size_is_refused() -> None:
    with pytest.raises(PolicyError, match="host_memory"):
        Policy(host_memory="many")


def test_an_arena_takes_the_memory_that_it_was_asked_for() -> None:
    """Within a per cent: neither rounded up to a power of two nor doubled."""
    process = psutil.Process()
    for nbytes in (100 << 20, (128 << 20) + 4096, 333_333_333):
        before = process.memory_info().rss
        with Arena(nbytes) as arena:
            view = arena.view(0, nbytes)
            for page in range(0, nbytes, 4096):
                view[page] = 1
            taken = process.memory_info().rss - before
            view.release()
        assert abs(taken - nbytes) <= 0.01 * nbytes + (2 << 20)
        left = process.memory_info().rss - before
        assert left <= 0.01 * nbytes + (2 << 20)


_USER = """
    import json, os, sys, torch
    import penstock
    from penstock import Policy
    policy = Policy(
        device_memory="1MiB", resident_below=1, host_memory="1GiB", host_shared=True
    )
    with penstock.load(sys.argv[1], policy) as model:
        with torch.inference_mode():
            total = float(model(torch.arange(2, 12)[None]).logits.double().sum())
        host = model._penstock_engine._tiers.host
        print(json.dumps({
            "path": str(host.memory.path), "nbytes": host.memory.nbytes,
            "filled": host.was_filled_here, "total": total,
        }), flush=True)
        sys.stdin.readline()
"""


def _mapped(process: int, path: str) -> dict[str, int]:
    """Rss and Pss, in bytes, of the mapping of `path` in that process."""
    found: dict[str, int] = {}
    is_it = False
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        key, _, rest = line.partition(":")
        if " " in key:  # the head of a mapping
            is_it = line.endswith(path)
        elif is_it and key in ("Rss", "Pss"):
            found[key] = found.get(key, 0) + int(rest.split()[0]) * 1024
    return found


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER.is_dir(), reason="no /dev/shm")
def test_two_processes_hold_one_copy(tmp_path: Path) -> None:
    path = tmp_path / "wide"
    zoo.save_checkpoint("llama", path)
    command = [sys.executable, "-c", textwrap.dedent(_USER), str(path)]
    users = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        found = []
        for user in users:
            assert user.stdout is not None
            found.append(json.loads(user.stdout.readline()))
        assert found[0]["path"] == found[1]["path"]
        assert found[0]["total"] == found[1]["total"]
        assert sorted(one["filled"] for one in found) == [False, True]
        sizes = [_mapped(user.pid, found[0]["path"]) for user in users]
        nbytes = found[0]["nbytes"]
        assert sum(one["Pss"] for one in sizes) <= 1.01 * nbytes + 8192
        assert all(one["Rss"] > 0.9 * nbytes for one in sizes)
    finally:
        for user in users:
            user.communicate("\n", timeout=60)
    assert not Path(found[0]["path"]).exists()


def test_the_engine_says_what_is_in_host_memory(folder: Path) -> None:
    policy = Policy(**POLICY, host_memory="1GiB")
    with penstock.load(folder, policy) as model:
        assert "units in" in repr(engine_of(model)._tiers.host)
