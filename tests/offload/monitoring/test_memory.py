"""How much memory there is, by the cgroups of a process and its own limits."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from penstock.offload.monitoring import memory
from penstock.offload.monitoring.cgroup import levels
from penstock.offload.monitoring.memory import available_bytes, installed_bytes

MIB = 1 << 20
V1_MOUNT = "35 31 0:32 {top} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
V2_MOUNT = "30 23 0:26 {top} {at} rw,nosuid shared:4 - cgroup2 cgroup2 rw"
V1 = Path("sys/fs/cgroup/memory")
V2 = Path("sys/fs/cgroup")
NO_LIMIT = 9223372036854771712


def write(root: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")


def process(root: Path, cgroup: str, mounts: str) -> None:
    write(root, {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mounts})


def v1(root: Path, path: str, limit: object, used: int, stat: str = "") -> None:
    folder = V1 / path
    write(
        root,
        {
            f"{folder}/memory.limit_in_bytes": limit,
            f"{folder}/memory.usage_in_bytes": used,
            f"{folder}/memory.stat": stat,
            f"{folder}/memory.use_hierarchy": 1,
        },
    )


def v2(
    root: Path, path: str, limit: object, used: int, stat: str = "", high: str = "max"
) -> None:
    folder = V2 / path
    write(
        root,
        {
            f"{folder}/memory.max": limit,
            f"{folder}/memory.high": high,
            f"{folder}/memory.current": used,
            f"{folder}/memory.stat": stat,
        },
    )


def found(root: Path) -> list[tuple[int, int]]:
    """(limit, available) of each level, in MiB."""
    return [(level.limit // MIB, level.available // MIB) for level in levels(root)]


def test_the_least_limit_from_the_own_cgroup_to_the_root_counts(tmp_path: Path) -> None:
    process(tmp_path, "0::/a.slice/b.scope", V2_MOUNT.format(top="/", at=f"/{V2}"))
    v2(tmp_path, "a.slice/b.scope", "max", 10 * MIB)
    v2(tmp_path, "a.slice", 300 * MIB, 100 * MIB)
    (tmp_path / V2 / "memory.stat").write_text("anon 5\n")
    assert found(tmp_path) == [(300, 200)]
    v2(tmp_path, "a.slice/b.scope", 150 * MIB, 10 * MIB)
    assert found(tmp_path) == [(150, 140), (300, 200)]
    assert installed_bytes(tmp_path) == 150 * MIB
    assert available_bytes(tmp_path) == 140 * MIB


def test_version_1_counts_the_levels_around_as_well(tmp_path: Path) -> None:
    cgroup = "9:name=systemd:/x\n4:cpu,memory:/job/step\n0::/"
    process(tmp_path, cgroup, V1_MOUNT.format(top="/"))
    v1(tmp_path, "job/step", NO_LIMIT, 20 * MIB)
    v1(tmp_path, "job", 400 * MIB, 100 * MIB)
    v1(tmp_path, "", NO_LIMIT, 9000 * MIB)
    assert found(tmp_path) == [(400, 300)]


def test_a_level_of_version_1_without_hierarchy_counts_its_own_processes(
    tmp_path: Path,
) -> None:
    process(tmp_path, "4:memory:/job/step", V1_MOUNT.format(top="/"))
    v1(tmp_path, "job/step", 600 * MIB, 0)
    v1(tmp_path, "job", 400 * MIB, 0)
    write(tmp_path, {f"{V1}/job/memory.use_hierarchy": 0})
    assert found(tmp_path) == [(600, 600)]


def test_both_versions_side_by_side(tmp_path: Path) -> None:
    mounts = V1_MOUNT.format(top="/") + "\n"
    mounts += V2_MOUNT.format(top="/", at="/sys/fs/cgroup/unified")
    process(tmp_path, "4:memory:/job\n0::/user.slice", mounts)
    v1(tmp_path, "job", 400 * MIB, 0)
    write(tmp_path, {"sys/fs/cgroup/unified/user.slice/cgroup.procs": 1})
    assert found(tmp_path) == [(400, 400)]


def test_a_limit_from_which_on_processes_are_slowed_down_is_a_limit(
    tmp_path: Path,
) -> None:
    process(tmp_path, "0::/a", V2_MOUNT.format(top="/", at=f"/{V2}"))
    v2(tmp_path, "a", 400 * MIB, 0, high=f"{300 * MIB}")
    assert found(tmp_path) == [(300, 300)]


def test_page_cache_is_free_unless_it_must_be_written_first(tmp_path: Path) -> None:
    mib = MIB
    stat = (
        f"anon 9\nfile {90 * mib}\ninactive_file {60 * mib}\nactive_file {30 * mib}\n"
    )
    stat += f"file_dirty {8 * mib}\nfile_writeback {2 * mib}"
    process(tmp_path, "0::/a", V2_MOUNT.format(top="/", at=f"/{V2}"))
    v2(tmp_path, "a", 400 * mib, 100 * mib, stat)
    assert found(tmp_path) == [(400, 380)]


def test_page_cache_of_cgroups_below_is_in_the_totals_of_version_1(
    tmp_path: Path,
) -> None:
    stat = f"inactive_file 0\nactive_file 0\ntotal_inactive_file {50 * MIB}\n"
    stat += f"total_active_file {20 * MIB}\ntotal_dirty {5 * MIB}\ntotal_writeback 0"
    process(tmp_path, "4:memory:/job", V1_MOUNT.format(top="/"))
    v1(tmp_path, "job", 400 * MIB, 100 * MIB, stat)
    assert found(tmp_path) == [(400, 365)]


@pytest.mark.parametrize(
    ("cgroup", "top"),
    [
        ("/", "/"),  # a namespace of its own
        ("/docker/0123", "/docker/0123"),  # the host's path, and the mount is below it
        ("/kubepods/pod1/0123", "/"),  # the host's path, which is not in the mount
        ("/../job", "/"),  # moved out of the namespace
        ("/", "/../.."),
        ("/docker/0123", "/docker/other"),
    ],
)
def test_a_container_finds_its_limit_at_the_root_of_the_mount(
    cgroup: str, top: str, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    process(one, f"4:memory:{cgroup}", V1_MOUNT.format(top=top))
    v1(one, "", 1200 * MIB, 200 * MIB)
    assert found(one) == [(1200, 1000)]
    process(two, f"0::{cgroup}", V2_MOUNT.format(top=top, at=f"/{V2}"))
    v2(two, "", 1200 * MIB, 200 * MIB)
    assert found(two) == [(1200, 1000)]


def test_a_limit_around_that_is_out_of_sight_is_in_the_own_figures(
    tmp_path: Path,
) -> None:
    process(tmp_path, "4:memory:/", V1_MOUNT.format(top="/"))
    stat = f"hierarchical_memory_limit {700 * MIB}"
    v1(tmp_path, "", NO_LIMIT, 100 * MIB, stat)
    assert found(tmp_path) == [(700, 600)]


def test_a_mount_with_a_blank_in_its_path_is_found(tmp_path: Path) -> None:
    process(tmp_path, "0::/a", V2_MOUNT.format(top="/", at="/my\\040cgroups"))
    write(tmp_path, {"my cgroups/a/memory.max": 5 * MIB})
    assert found(tmp_path) == [(5, 5)]


def test_without_mountinfo_the_usual_places_are_looked_at(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "4:memory:/job"})
    v1(tmp_path, "job", 400 * MIB, 0)
    assert found(tmp_path) == [(400, 400)]


@pytest.mark.parametrize("text", ["", "max", "-1", "1e9", "²", "9" * 5000, "\0", "4 K"])
def test_what_is_no_number_is_no_limit(text: str, tmp_path: Path) -> None:
    process(tmp_path, "0::/a\nodd\n:::\n7:memory", V2_MOUNT.format(top="/", at="/c"))
    write(tmp_path, {"c/a/memory.max": text, "c/a/memory.stat": "odd\nfile x\n"})
    assert found(tmp_path) == []
    assert available_bytes(tmp_path) > 0


def test_without_cgroups_there_is_the_machine(tmp_path: Path) -> None:
    assert levels(tmp_path) == []
    assert installed_bytes(tmp_path) == psutil.virtual_memory().total


def test_a_cgroup_that_is_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    process(tmp_path, "0::/a", V2_MOUNT.format(top="/", at=f"/{V2}"))
    v2(tmp_path, "a", 100 * MIB, 150 * MIB)
    assert available_bytes(tmp_path) == 0


@pytest.mark.parametrize("kind", ["-v", "-d"])
def test_the_limits_of_a_process_on_itself_count(kind: str) -> None:
    code = (
        "from penstock.offload.monitoring.memory import available_bytes as a;print(a())"
    )
    shell = f"ulimit {kind} 1000000 && exec {sys.executable} -c '{code}'"
    left = int(subprocess.check_output(["bash", "-c", shell], text=True))
    assert 0 < left < 1_000_000 << 10


def test_a_process_knows_what_it_has() -> None:
    used = memory.usage()
    assert 0 < used.file_bytes < used.resident_bytes <= used.peak_bytes
    assert used.data_bytes <= used.address_bytes


@pytest.fixture
def real_cgroup() -> Iterator[Path]:
    """One of this machine, with another in it."""
    for top in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
        if not (top / "memory.stat").exists():
            continue
        outer = top / "penstock-test-memory"
        try:
            (outer / "inner").mkdir(parents=True)
        except OSError:
            continue
        yield outer
        (outer / "inner").rmdir()
        outer.rmdir()
        return
    pytest.skip("no memory cgroup can be made here")


def test_a_process_in_a_cgroup_in_another_finds_the_limit_of_that(
    real_cgroup: Path,
) -> None:
    names = ("memory.limit_in_bytes", "memory.max")
    limit = next((real_cgroup / n for n in names if (real_cgroup / n).exists()), None)
    if limit is None:
        pytest.skip("the memory controller is not handed down")
    limit.write_text(f"{256 * MIB}")
    code = "from penstock.offload.monitoring.memory import *; print(installed_bytes())"
    shell = f"echo $$ > {real_cgroup}/inner/cgroup.procs && exec {sys.executable} -c '"
    out = subprocess.check_output(["bash", "-c", f"{shell}{code}'"], text=True)
    assert int(out) == 256 * MIB
