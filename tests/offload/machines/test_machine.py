"""Files of machines: shipped, measured, found, and wrong."""

from __future__ import annotations

import itertools
import re
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from typer.testing import CliRunner

from penstock.io.errors import PolicyError, UsageError
from penstock.offload.cli import app
from penstock.offload.machines import (
    measure,
    measure_beside,
    measure_between,
    measure_calls,
    measure_products,
)
from penstock.offload.machines.machine import (
    Calls,
    Disk,
    Machine,
    find_machine,
    own_machine_path,
    shipped_machines,
)
from penstock.offload.machines.measure_calls import Block, TwoDepths, calls
from penstock.offload.machines.measure_gpu import copies_of
from penstock.offload.machines.measuring import measure_machine
from penstock.offload.machines.readers_found import reader_lines
from penstock.offload.machines.rounds import rounds
from penstock.offload.plans.rates import rates_of
from penstock.offload.policy import IO, Policy

SMALL = """
name: small
source: a test
host_memory: 8GiB
host_bandwidth: 10GB
matmul: {float32: {1: 2.0e9, 512: 1.0e11}}
disk: {bandwidth: {threads: 1GB, libaio: 2GB}}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize("name", sorted(shipped_machines()))
def test_shipped_machines_are_whole_and_name_their_sources(name: str) -> None:
    machine = find_machine(name)
    assert machine is not None
    assert machine.source
    dtype = next(iter(machine.matmul))
    if machine.disk is not None:
        assert rates_of(machine, Policy(), dtype).links["disk"] > 1e9


def test_what_is_written_is_read_again(small: Path, tmp_path: Path) -> None:
    machine = Machine.from_yaml(small)
    again = tmp_path / "again.yaml"
    again.write_text(machine.to_yaml())
    assert Machine.from_yaml(again) == machine
    assert "# Bytes of the host's memory" in again.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("speed: 3", "unknown key 'speed'; a machine has: name"),
        ("host_memory: lots", "host_memory: 'lots' is not a size"),
        ("matmul: {float32: {1: -2}}", "matmul.float32.1"),
        ("source:", "source"),
    ],
)
def test_wrong_files_are_one_sentence(small: Path, change: str, message: str) -> None:
    key = change.partition(":")[0]
    lines = [line for line in SMALL.splitlines() if not line.startswith(f"{key}:")]
    small.write_text("\n".join([*lines, change]))
    with pytest.raises(PolicyError, match=message) as caught:
        Machine.from_yaml(small)
    assert str(small) in str(caught.value)


def test_this_computer_is_found_once_it_was_measured(
    small: Path, tmp_path: Path
) -> None:
    assert find_machine(None, tmp_path / "cache") is None
    own = own_machine_path(tmp_path / "cache")
    own.parent.mkdir()
    own.write_text(SMALL)
    assert find_machine(None, tmp_path / "cache") == Machine.from_yaml(small)
    with pytest.raises(PolicyError, match="h100-pcie5"):
        find_machine("h100-pcie6")


def test_links_of_the_policy_hold_those_of_the_machine(small: Path) -> None:
    machine = Machine.from_yaml(small)
    slow = Policy(links={"disk": {"bandwidth": "100MB"}, "host": {"bandwidth": "3GB"}})
    assert rates_of(machine, Policy(), "float32").links == {"disk": 2e9}
    assert rates_of(machine, slow, "float32").links == {"disk": 1e8, "host": 3e9}
    threads = Policy(io={"reader": "threads"})
    assert rates_of(machine, threads, "float32").links == {"disk": 1e9}


def test_a_dtype_that_was_not_measured_is_not_guessed(small: Path) -> None:
    with pytest.raises(PolicyError, match="no matmul rates for bfloat16"):
        rates_of(Machine.from_yaml(small), Policy(), "bfloat16")


class FakeCopier:
    """Each way takes so many seconds; different ways go at once."""

    def __init__(self, seconds: dict[tuple[str, bool], float], *, peer: bool) -> None:
        self.now = 0.0
        self._seconds = seconds
        self._until = 0.0
        self._peer = peer

    @property
    def has_peer(self) -> bool:
        return self._peer

    def copy(self, way: str, *, pinned: bool) -> None:
        self._until = max(self._until, self.now + self._seconds[way, pinned])

    def wait(self) -> None:
        self.now = max(self.now, self._until)


def test_copies_are_timed_each_way_and_both_at_once() -> None:
    seconds = {
        ("in", True): 1.0, ("out", True): 2.0, ("peer", True): 0.5,
        ("in", False): 4.0, ("out", False): 8.0,
    }  # fmt: skip
    copier = FakeCopier(seconds, peer=True)
    found = copies_of(copier, 800, clock=lambda: copier.now)
    assert found.model_dump() == {
        "pinned_to_device": 800,
        "pinned_to_host": 400,
        "both_ways": 400,
        "pageable_to_device": 200,
        "pageable_to_host": 100,
        "peer": 1600,
    }
    alone = FakeCopier(seconds, peer=False)
    assert copies_of(alone, 800, clock=lambda: alone.now).peer is None


def test_what_is_computed_is_looked_at_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure_products, "ROWS", (1, 8, 16))
    monkeypatch.setattr(measure_products, "LENGTHS", (32,))
    flops = 2 * 2048 * 5632
    attention = 4 * 32 * 16 * 32 * 64 * 32
    of_looks = [1.0, 2.0, 8.0, 5.0], [3.0, 2.0, 16.0, 5.0], [2.0, 5.0, 24.0, 8.0]
    looks = itertools.chain(*of_looks)  # of 1, 8 and 16 rows, and of a length of 32
    monkeypatch.setattr(
        measure_products, "seconds_of", lambda act, **_: (act(), next(looks))[1]
    )
    products = measure_products.Products(torch.float32, "cpu", lambda: None)
    for _ in range(3):
        products.look()
    usual = {1: flops // 2, 8: round(8 * flops / 3), 16: round(8 * flops / 3)}
    assert products.usual() == (usual, {32: round(attention / 6)})  # never fewer


def test_what_disturbs_a_run_is_not_counted() -> None:
    times = iter([0.0, 0.5, 0.5, 0.6, 0.6, 0.7, 0.7, 0.9])
    found = measure.seconds_of(lambda: None, clock=lambda: next(times), least=4, most=4)
    assert found == pytest.approx(0.1)


def test_what_a_block_takes_is_the_median_of_moments() -> None:
    seconds = {"shallow": iter([1.0, 5.0, 2.0]), "deep": iter([2.0, 8.0, 2.5])}
    models = TwoDepths("shallow", "deep", num_more=2)
    assert models.per_block(lambda model: next(seconds[model])) == 0.5
    backwards = {"shallow": 2.0, "deep": 1.0}
    assert models.per_block(lambda model: backwards[model]) == 0.0
    assert models.once(lambda model: backwards[model]) == -0.5


def test_the_clock_leaves_out_what_it_is_told_to() -> None:
    x, own = torch.ones(3, 3), functional.linear
    waits: list[None] = []
    with measure_between.rest_clock(lambda: waits.append(None), "linear") as clock:
        begin = time.perf_counter()
        time.sleep(0.02)
        clock.leave_out(time.sleep, 0.2)
        assert torch.nn.Linear(3, 2)(x).shape == (3, 2)
        spent = time.perf_counter() - begin
        assert 0.02 <= clock.seconds < spent - 0.19
    assert len(waits) == 4  # before and after each
    assert functional.linear is own
    with (
        pytest.raises(ZeroDivisionError),
        measure_between.rest_clock(lambda: None, "linear"),
    ):
        1 / 0  # noqa: B018
    assert functional.linear is own


@pytest.mark.whole
@pytest.mark.slow
def test_what_is_between_products_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> None:
    small = Block(hidden=64, intermediate=128, heads=4)
    monkeypatch.setattr(measure_between, "_LARGE", small)
    monkeypatch.setattr(measure_between, "_MIDDLE", small)
    found = measure_between.measure_between("cpu", tmp_path, 0.0, lambda: None)
    assert found.pointwise is not None
    assert 1e6 < found.pointwise < 1e12
    assert 1e-6 < found.joint_module < 1e-2
    assert found.first_touch >= 0.0
    own = calls("cpu", tmp_path, 1e-9)
    assert 1e-6 < own.module < 1e-2
    assert 1e-6 < own.decode_module < 1e-2
    assert own.joint_module == 0.0  # measured with what is between
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("place", "device", "words"),
    [
        ("none", "cpu", "no such folder or file"),
        (".", "gpu", "'gpu' is not a device: write cpu, cuda"),
        (".", "cuda:99", r"cuda:99.*(finds no accelerator|of them)"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_measured(
    tmp_path: Path, place: str, device: str, words: str
) -> None:
    command = ["machine", "--disk", str(tmp_path / place), "--device", device]
    failed = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "m.yaml")])
    assert re.search(words, str(failed.exception))
    assert failed.output == ""


def test_a_file_that_is_too_small_for_a_drive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(bytes(5000))
    with pytest.raises(UsageError, match=r"4\.9 KiB, too little .* MiB or more"):
        measure.disk(tmp_path / "small", IO(cache=tmp_path), lambda part: None)


@pytest.mark.slow
def test_this_computer_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> None:
    """Everything but the models, which take long: at toy size."""
    monkeypatch.setattr(measure_products, "ROWS", (1, 8))
    monkeypatch.setattr(measure_products, "LENGTHS", (32,))
    monkeypatch.setattr(measure, "_MOST_SECONDS", 0.01)
    monkeypatch.setattr(measure, "_SCRATCH_BYTES", 192 << 20)
    monkeypatch.setattr(measure_beside, "_NUM_BLOCKS", 3)
    module = "penstock.offload.machines.measuring"
    monkeypatch.setattr(f"{module}.calls", lambda *_: Calls(product=1e-6))
    between = measure_between.Between(int(7e9), int(3e9), 1e-4, 3e-4, 2e-9)
    monkeypatch.setattr(f"{module}.measure_between", lambda *_: between)
    parts: list[str] = []
    machine = measure_machine(tmp_path, IO(cache=tmp_path), parts.append)
    assert machine.num_threads == torch.get_num_threads()
    assert set(machine.matmul) == {"float32", "bfloat16"}
    assert machine.disk is not None
    assert machine.disk.bandwidth["threads"] > 0
    assert machine.calls.first_touch_per_gb == pytest.approx(2.0)
    assert (machine.calls.product, machine.calls.joint_module) == (1e-6, 1e-4)
    assert machine.calls.kv_layer == 3e-4
    assert 0.0 <= machine.calls.cast_per_gb < 60.0  # noise, in so small a model
    rates = machine.pointwise_bandwidth, machine.decode_bandwidth
    assert rates == (int(7e9), int(3e9))
    assert parts
    assert not list(tmp_path.glob("penstock-scratch-*"))
    path = tmp_path / "machine.yaml"
    path.write_text(machine.to_yaml())
    assert Machine.from_yaml(path).matmul.keys() == machine.matmul.keys()


def test_rounds_end_within_their_budget_but_the_first_is_made() -> None:
    def made(each: float) -> int:
        now = [0.0]
        count = 0
        for _ in rounds(3, seconds=4.0, clock=lambda: now[0]):
            now[0] += each
            count += 1
        return count

    assert [made(each) for each in (0.1, 1.3, 1.5, 2.5, 100.0)] == [3, 3, 2, 1, 1]


def test_a_drive_has_a_size_and_files_of_before_have_none(tmp_path: Path) -> None:
    found = measure.disk_sizes(tmp_path / "not" / "there" / "yet")
    assert 0 < found["free"] <= found["capacity"]
    path = tmp_path / "machine.yaml"
    shipped = shipped_machines()["h200"].read_text().splitlines()
    path.write_text("\n".join(line for line in shipped if "free:" not in line))
    old = Machine.from_yaml(path).disk
    assert old is not None
    assert (old.free, old.capacity) == (None, None)
    path.write_text("\n".join(shipped).replace("free: 24TB", "free: much"))
    with pytest.raises(PolicyError, match=r"disk\.free"):
        Machine.from_yaml(path)
    for name, file in shipped_machines().items():
        disk = Machine.from_yaml(file).disk
        assert disk is None or disk.free, name


def test_readers_are_listed_with_the_one_that_is_chosen_and_what_is_missing() -> None:
    disk = Disk(
        bandwidth={"threads": int(1.01e9), "libaio": int(1e9), "aiofiles": int(4e9)},
        cpu_seconds_per_gb={"threads": 0.5, "libaio": 0.1, "aiofiles": 0.9},
    )
    assert reader_lines(disk, {"gds": "no GPU (get one)"}) == [
        "reader threads: 1.01 GB/s",
        "reader libaio: 1.00 GB/s (io.reader: auto takes it)",
        "reader aiofiles: 4.00 GB/s",
        "reader gds: not here: no GPU (get one)",
    ]


def test_what_is_measured_with_small_models_announces_no_reader(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, no_leaks: None
) -> None:
    policy = measure_calls.jobs_policy("cpu", tmp_path)
    with measure_calls.two_depths(
        Block(hidden=64, intermediate=96, heads=2), policy, deep=2
    ):
        assert "reader" not in caplog.text
