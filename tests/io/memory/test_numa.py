"""Where a machine has several nodes, memory is asked for on the right one."""

from __future__ import annotations

import ctypes
import mmap
import platform
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.io.memory.numa import bind, node_near, nodes

PAGE = mmap.PAGESIZE

MakeSystem = Callable[..., Path]


@pytest.fixture
def make_system(tmp_path: Path) -> MakeSystem:
    """Makes a tree like that of /sys, with these nodes and PCI devices."""

    def make(online: str, devices: dict[str, str] | None = None) -> Path:
        folder = tmp_path / "devices/system/node"
        folder.mkdir(parents=True)
        (folder / "online").write_text(f"{online}\n")
        for pci, node in (devices or {}).items():
            device = tmp_path / "bus/pci/devices" / pci
            device.mkdir(parents=True)
            (device / "numa_node").write_text(f"{node}\n")
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("online", "wanted"),
    [("0", (0,)), ("0-1", (0, 1)), ("0-2,5,7-8", (0, 1, 2, 5, 7, 8))],
)
def test_nodes_are_those_that_are_online(
    online: str, wanted: tuple[int, ...], make_system: MakeSystem
) -> None:
    assert nodes(make_system(online)) == wanted


def test_a_system_that_does_not_tell_has_no_nodes(tmp_path: Path) -> None:
    assert nodes(tmp_path) == ()
    assert node_near("0000:3b:00.0", tmp_path) is None


def test_a_device_is_near_its_own_node(make_system: MakeSystem) -> None:
    system = make_system(
        "0-1",
        {"0000:3b:00.0": "0", "0000:af:00.0": "1", "0000:01:00.0": "-1"},
    )
    assert node_near("0000:3b:00.0", system) == 0
    assert node_near("0000:AF:00.0", system) == 1
    assert node_near("0000:01:00.0", system) is None  # the firmware does not tell
    assert node_near("0000:02:00.0", system) is None  # there is none


def test_on_one_node_there_is_nothing_to_choose(make_system: MakeSystem) -> None:
    assert node_near("0000:3b:00.0", make_system("0", {"0000:3b:00.0": "0"})) is None


def policy_at(address: int) -> str:
    """The kernel's word on the mapping that begins at `address`."""
    for line in Path("/proc/self/numa_maps").read_text().splitlines():
        start, policy = line.split()[:2]
        if int(start, 16) == address:
            return policy
    raise AssertionError(f"no mapping begins at {address:x}")


def test_memory_is_bound_or_it_is_said_why_not() -> None:
    mapped = mmap.mmap(-1, 64 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    anchor = ctypes.c_char.from_buffer(mapped)
    address = ctypes.addressof(anchor)
    refusal = bind(address, 64 * PAGE, nodes()[0] if nodes() else 0)
    try:
        if refusal is not None:  # a container may forbid it
            assert "not bound to NUMA node 0: " in refusal
        elif Path("/proc/self/numa_maps").exists():
            assert policy_at(address).startswith("prefer")
    finally:
        del anchor
        mapped.close()


@pytest.mark.parametrize("node", [-1, 1023, 1 << 20])
def test_a_node_that_is_not_there_is_a_sentence(node: int) -> None:
    with mmap.mmap(-1, PAGE) as mapped:
        anchor = ctypes.c_char.from_buffer(mapped)
        refusal = bind(ctypes.addressof(anchor), PAGE, node)
        del anchor
    assert refusal is not None
    assert f"not bound to NUMA node {node}: " in refusal


def test_an_unknown_machine_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    refusal = bind(0, PAGE, 0)
    assert refusal is not None
    assert "riscv64" in refusal
