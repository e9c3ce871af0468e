"""Three floors, and imports go down only: offload -> scheduler -> io."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import penstock

ROOT = Path(penstock.__file__).parent
FLOORS = ("io", "scheduler", "offload")
FILES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
MAX_LINES = 300

ORDER = {
    "io": (
        "weights",
        "kv",
        "codecs",
        "sharing",
        "readers",
        "checkpoint",
        "devices",
        "memory",
        "",  # the files beside the folders
    ),
    "scheduler": (
        "simulation",
        "sweep",
        "activations",
        "ranks",
        "kv",
        "slots",
        "cost",
        "",
    ),
    "offload": (
        "commands",
        "tuning",
        "quality",
        "convert",
        "jobs",
        "reports",
        "plans",
        "machines",
        "tasks",
        "generation",
        "rows",
        "",
        "engine",
        "experts",
        "tensor_ranks",
        "ranks",
        "kv",
        "weights",
        "configs",
        "units",
        "traces",
        "settings",
        "monitoring",
        "files",
    ),
}
"""The folders of each floor, from the top down: imports go down only here, too."""
FACES = {
    "offload.cli": "commands",
    "offload.mapper": "tasks",
    "offload.policy": "settings",
}
"""Files beside the folders that belong to one of them."""
MAX_FILES = 20
"""In a folder, without its note."""

PURE = {
    "io/tier.py",
    "io/weights/load.py",
    "io/sharing/pass_clock.py",
    "io/sharing/patience.py",
    "io/sharing/table.py",
    "io/timeline.py",
    "offload/files/parts.py",
    "offload/jobs/manifest.py",
    "offload/monitoring/time_left.py",
    "offload/monitoring/samples.py",
    "offload/reports/bound.py",
    "offload/reports/counts.py",
    "offload/reports/perfetto.py",
    "offload/reports/rank_record.py",
    "offload/reports/recorded.py",
    "offload/tuning/candidates.py",
    "offload/tuning/race.py",
    "scheduler/sweep/admission.py",
    "scheduler/slots/pending_ranges.py",
    "scheduler/cost/model.py",
    "scheduler/simulation/event_loop.py",
    "scheduler/sweep/sweep_input.py",
    "scheduler/kv/budget.py",
    "scheduler/cost/load_cost.py",
    "scheduler/cost/memory_need.py",
    "scheduler/order.py",
    "scheduler/packing.py",
    "scheduler/cost/partitioning.py",
    "scheduler/cost/pipeline.py",
    "scheduler/placement.py",
    "scheduler/ranks/load_order.py",
    "scheduler/ranks/messages.py",
    "scheduler/ranks/owners.py",
    "scheduler/ranks/rank_statistics.py",
    "scheduler/ranks/stages.py",
    "scheduler/cost/ranked_model.py",
    "scheduler/cost/ranked_pass.py",
    "scheduler/cost/rates.py",
    "scheduler/simulation/schedule.py",
    "scheduler/cost/shape.py",
    "scheduler/simulation/simulated.py",
    "scheduler/cost/switch.py",
    "scheduler/cost/tensor_model.py",
    "scheduler/cost/site_loads.py",
    "scheduler/cost/site_time.py",
    "scheduler/slots/routing.py",
    "scheduler/slots/slots.py",
    "scheduler/cost/traffic.py",
    "scheduler/simulation/turns.py",
    "scheduler/cost/workload.py",
    "scheduler/cost/worth.py",
}
"""Decisions: they could be taken on a machine with no torch, clock or file."""
PURE_BELOW = {"penstock.io.errors", "penstock.io.event", "penstock.io.merging"}
PURE_IMPORTS = {
    "re",
    "bisect",
    "collections",
    "dataclasses",
    "enum",
    "functools",
    "heapq",
    "itertools",
    "math",
    "numpy",
    "operator",
    "regex",
    "typing",
}

TIERS = {
    "penstock.io.readers.libaio_reader",
    "penstock.io.readers.aiofiles_reader",
    "penstock.io.readers.gds",
    "penstock.io.weights.peer",
    "penstock.io.readers.threads",
}
"""Modules of one way to read or place to keep; whoever imports one has chosen it."""
CHOOSERS = ("offload/engine/readers.py", "offload/engine/tiers.py")
REHEARSAL = "scheduler/simulation/rehearsal.py"
"""Puts them together with nothing behind them."""
PARTS = {"Binding", "OpenSites", "ForwardEntry", "Order", "Tiers", "WorkingSet"}
"""What a streamed model is put together from."""


@dataclass(frozen=True)
class Import:
    """`from module import name`, or `import module`."""

    module: str
    name: str
    level: int
    line: int

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def floor_at(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@functools.cache
def imports_of(path: Path) -> list[Import]:
    return list(_imports_of(path))


def _imports_of(path: Path) -> Iterator[Import]:
    """All of them, in functions and under TYPE_CHECKING too, with absolute names."""
    here = ["penstock", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, "", 0, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) + 1 - node.level] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                yield Import(module, alias.name, node.level, node.lineno)


def floor_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "penstock" and len(parts) > 1 else None


def folder_of(module: str) -> tuple[str, str] | None:
    """The floor of a module, and the folder there that it is in, or whose face it
    is."""
    package, *parts = module.split(".")[:3]
    if package != "penstock" or len(parts) < 2 or parts[0] not in ORDER:
        return None
    floor, name = parts
    name = FACES.get(f"{floor}.{name}", name)
    return floor, name if name in ORDER[floor] else ""


def climbs(module: str, imports: Iterable[Import]) -> list[Import]:
    """Which of the imports of a module go up in ORDER, on its own floor."""
    here = folder_of(module)
    assert here is not None, f"{module} is on no floor"
    floor, folder = here
    order = ORDER[floor]
    above = {(floor, name) for name in order[: order.index(folder)]}
    return [
        found for found in imports if folder_of(f"{found.module}.{found.name}") in above
    ]


def test_all_three_floors_were_found() -> None:
    assert {floor_at(path) for path in FILES} == set(FLOORS)
    assert {label(path) for path in FILES} >= PURE


def test_imports_go_down_only() -> None:
    wrong = [
        (label(path), found)
        for path in FILES
        for found in imports_of(path)
        if found.package == "penstock"
        and floor_of(found.module) not in FLOORS[: FLOORS.index(floor_at(path)) + 1]
    ]
    assert wrong == []


def test_folders_import_down_only() -> None:
    wrong = []
    for path in FILES:
        module = ".".join(["penstock", *Path(label(path)).with_suffix("").parts])
        if len(Path(label(path)).parts) > 1 and path.stem != "__init__":
            wrong += [(label(path), up) for up in climbs(module, imports_of(path))]
    assert wrong == []


@pytest.mark.parametrize("floor", FLOORS)
def test_all_folders_are_in_the_order(floor: str) -> None:
    folders = {path.parent for path in FILES if floor_at(path) == floor}
    names = [folder.relative_to(ROOT / floor).as_posix() for folder in folders]
    assert sorted(names) == sorted(name or "." for name in ORDER[floor])


@pytest.mark.parametrize("floor", FLOORS)
def test_contributors_are_told_the_same_order(floor: str) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    _, _, table = text.partition(f"| `{floor}/` |")
    rows = re.findall(r"^\| (?:`(\w+)/`|files beside)", table.split("\n\n")[0], re.M)
    assert tuple(rows) == (ORDER[floor] if "" in rows else ORDER[floor][:-1])


def test_faces_are_there() -> None:
    assert all((ROOT / f"{face.replace('.', '/')}.py").exists() for face in FACES)


@pytest.mark.parametrize("top", [*FLOORS, "bench", "examples", "tests"])
def test_a_folder_can_be_looked_through(top: str) -> None:
    paths = [path for path in (ROOT / top).rglob("*.py") if path.stem != "__init__"]
    files = [path for path in paths if ".envs" not in path.parts]
    counts = Counter(path.parent.relative_to(ROOT).as_posix() for path in files)
    assert {name: num for name, num in counts.items() if num > MAX_FILES} == {}


@pytest.mark.parametrize(
    ("importer", "module", "name", "is_up"),
    [
        ("offload.kv.cache", "penstock.offload.jobs.job", "Job", True),
        ("offload.kv.cache", "penstock.offload.jobs", "job", True),
        ("offload.kv.cache", "penstock.offload", "model", True),
        ("offload.kv.cache", "penstock.offload.kv.layers", "Layer", False),
        ("offload.kv.cache", "penstock.offload.policy", "Policy", False),
        ("offload.kv.cache", "penstock.io.memory.arena", "Arena", False),
        ("offload.jobs.job", "penstock.offload.kv.cache", "install", False),
        ("offload.policy", "penstock.offload.engine.engine", "Engine", True),
        ("offload.engine.engine", "penstock.offload.policy", "Policy", False),
        ("offload.model", "penstock.offload.cli", "main", True),
        ("offload.cli", "penstock.offload.model", "load", False),
        ("io.memory.arena", "penstock.io.readers.files", "Files", True),
        ("io.errors", "penstock.io.memory", "arena", True),
        ("io.readers.files", "penstock.io", "errors", False),
        ("scheduler.cost.model", "penstock.scheduler.sweep.loop", "SweepLoop", True),
        ("scheduler.sweep.loop", "penstock.scheduler.order", "Order", False),
    ],
)
def test_an_import_that_goes_up_is_found(
    importer: str, module: str, name: str, is_up: bool
) -> None:
    found = Import(module, name, 0, 1)
    assert climbs(f"penstock.{importer}", [found]) == [found] * is_up


def test_library_files_import_each_other_relatively() -> None:
    wrong = [
        (label(path), found)
        for path in FILES
        for found in imports_of(path)
        if found.package in ("tests", "bench", "examples")
        or (found.package == "penstock" and not found.level)
    ]
    assert wrong == []


def test_only_two_files_name_a_concrete_tier() -> None:
    wrong = [
        (label(path), found)
        for path in FILES
        if label(path) not in CHOOSERS and floor_at(path) != "io"
        for found in imports_of(path)
        if TIERS & {found.module, f"{found.module}.{found.name}"}
    ]
    assert wrong == []


def calls_in(path: Path) -> Iterator[tuple[str, int]]:
    """The names that are called, and the line of each call."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id, node.lineno


def test_one_kind_of_accelerator_is_named_by_the_devices_only() -> None:
    """Others ask them for what they need: it may be there for other kinds, too."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in [*FILES, *(ROOT / "bench" / "common").rglob("*.py")]
        if path.parent != ROOT / "io" / "devices"
        for node in ast.walk(ast.parse(path.read_text()))
        if (
            isinstance(node, ast.Attribute)
            and ast.unparse(node) in ("torch.cuda", "torch.xpu")
        )
        or (
            isinstance(node, ast.ImportFrom)
            and (node.module or "").startswith("torch.cuda")
        )
    ]
    assert not found


def test_only_build_puts_the_parts_together() -> None:
    """Others may name their types."""
    wrong = [
        (label(path), name, line)
        for path in FILES
        if label(path) not in ("offload/engine/build.py", REHEARSAL)
        for name, line in calls_in(path)
        if name in PARTS
    ]
    assert wrong == []


def test_build_does_name_them() -> None:
    found = [f for name in CHOOSERS for f in imports_of(ROOT / name)]
    imported = {m for f in found for m in (f.module, f"{f.module}.{f.name}")}
    assert imported >= TIERS
    made = {name for name, _ in calls_in(ROOT / "offload" / "engine" / "build.py")}
    assert made >= PARTS


def is_pure(found: Import) -> bool:
    """Whether a decision may import it."""
    file = f"{'/'.join(found.module.split('.')[1:])}.py"
    return (
        found.package in PURE_IMPORTS
        or found.module in PURE_BELOW
        or (found.package == "penstock" and file in PURE)
    )


def test_decisions_import_no_torch_clock_or_file() -> None:
    wrong = [
        (name, found)
        for name in sorted(PURE)
        for found in imports_of(ROOT / name)
        if not is_pure(found)
    ]
    assert wrong == []


def test_the_folder_io_is_no_regular_package() -> None:
    """With an __init__.py it would hide the standard library's io in places."""
    assert not (ROOT / "io" / "__init__.py").exists()
    assert (ROOT / "scheduler" / "__init__.py").exists()
    assert (ROOT / "offload" / "__init__.py").exists()


def test_no_file_is_named_like_a_module_of_the_standard_library() -> None:
    """A script's own folder comes first on sys.path. `penstock.io` is a folder, and
    `statistics` a name that nothing here imports the other one of."""
    taken = {label(p) for p in FILES if p.stem in sys.stdlib_module_names}
    assert taken == set()


def test_files_stay_short_enough_to_read() -> None:
    lines = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in FILES}
    assert [(label(p), num) for p, num in lines.items() if num > MAX_LINES] == []


def test_no_two_public_classes_share_a_name() -> None:
    names = Counter(
        node.name
        for path in FILES
        for node in tree_of(path).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert {name for name, num in names.items() if num > 1} == set()


def test_every_file_begins_with_what_it_is_for() -> None:
    assert [label(p) for p in FILES if not ast.get_docstring(tree_of(p))] == []


def test_importing_the_package_imports_no_floor() -> None:
    for found in imports_of(ROOT / "__init__.py"):
        node_is_lazy = found.level == 0 or floor_of(found.module) in FLOORS
        assert node_is_lazy
    top_level = [
        node
        for node in tree_of(ROOT / "__init__.py").body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    assert [ast.unparse(node) for node in top_level] == [
        "from typing import TYPE_CHECKING, Any"
    ]


@pytest.mark.slow
def test_the_command_line_starts_without_torch() -> None:
    """Which takes seconds, and `--help` needs none of it."""
    code = (
        "import sys, penstock.offload.cli\n"
        "print(*{'torch', 'pyarrow'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
