"""Whatever stands in a file that somebody gives us ends in a result or in a sentence:
no traceback, no process that hangs or takes all memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hostile
import penstock
from checkpoint import make_checkpoint
from hostile import survives
from jobs import run_job, write_rows
from penstock import Policy
from penstock.io.checkpoint import INDEX_FILE, open_checkpoint
from penstock.io.checksums import read_side_file
from penstock.offload.files.inputs import Inputs
from penstock.offload.files.jsonl import SCORED_KEYS
from penstock.offload.files.parts import Position
from penstock.offload.files.sources import find_files
from penstock.offload.jobs.part_store import PartStore
from penstock.offload.machines.machine import Machine
from penstock.offload.tasks.text import load_tokenizer, tokenize_all

ROWS = [{"id": 1, "text": "import os def foo return"}]
POLICY = """extends: laptop-16gb-ram-nvme
device_memory: 2MiB
placement: {"layers\\\\.[0-3]$": device}
links: {disk: {bandwidth: 500MB}}
io: {threads: 2, chunk: 1MiB}
"""
FEW = 6
"""Examples of each kind in the suite; a whole run has thousands."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_checkpoint(folder, "tiny", dtype="float32", shards_of="200KB")
    (folder / "modules.json").write_text(
        json.dumps([{"type": "models.Pooling", "path": "pooling"}])
    )
    (folder / "pooling").mkdir()
    pooling = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}
    (folder / "pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def loaded(folder: Path) -> None:
    with penstock.load(folder, {"device_memory": "2MiB"}) as model:
        list(penstock.score(model, ROWS))


def embedded(folder: Path) -> None:
    with penstock.load(folder, {"device_memory": "2MiB"}) as model:
        list(penstock.embed(model, ROWS))


def generated(folder: Path) -> None:
    with penstock.load(folder, {"device_memory": "2MiB"}) as model:
        list(penstock.generate(model, ROWS, max_new_tokens=2))


def tokenized(folder: Path) -> None:
    tokenize_all(load_tokenizer(folder), ROWS)


FILES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "config": ("config.json", loaded),
    "generation": ("generation_config.json", generated),
    "tokenizer": ("tokenizer.json", tokenized),
    "tokenizer settings": ("tokenizer_config.json", tokenized),
    "index": (INDEX_FILE, open_checkpoint),
    "modules": ("modules.json", embedded),
    "pooling": ("pooling/config.json", embedded),
}


def check_checkpoint(saved: Path, folder: Path, kind: str, num: int) -> None:
    name, read = FILES[kind]
    seed = json.loads((saved / name).read_bytes()) if (saved / name).exists() else {}
    shutil.copytree(saved, folder, dirs_exist_ok=True)

    @_settings(num)
    @given(hostile.tampered(seed))
    def check(content: bytes) -> None:
        (folder / name).write_bytes(content)
        survives(lambda: read(folder))

    check()


def check_header(saved: Path, folder: Path, num: int) -> None:
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    path = sorted(folder.glob("*.safetensors"))[0]
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]

    def whole(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + rest

    @_settings(num)
    @given(
        st.one_of(
            hostile.tampered(header).map(whole),
            hostile.broken(content[: 8 + length]).map(lambda head: head + rest),
        )
    )
    def check(changed: bytes) -> None:
        path.write_bytes(changed)
        survives(lambda: open_checkpoint(folder))

    check()


def check_policy(folder: Path, num: int) -> None:
    path = folder / "policy.yaml"

    @_settings(num)
    @given(
        st.one_of(
            hostile.broken(POLICY.encode()),
            hostile.tampered(Policy().model_dump(mode="json")),
            st.text(max_size=60).map(lambda text: text.encode(errors="replace")),
        )
    )
    def check(content: bytes) -> None:
        path.write_bytes(content)
        survives(lambda: Policy.from_yaml(path))
        survives(lambda: Machine.from_yaml(path))

    check()


def check_settings(folder: Path, num: int) -> None:
    keys = st.sampled_from([*Policy.model_fields, "io.threads", "kv.tier", "a", "io.a"])
    values = st.one_of(
        st.text(max_size=20), st.sampled_from(hostile.VALUES).map(json.dumps)
    )

    @_settings(num)
    @given(st.lists(st.builds("{}={}".format, keys, values), max_size=4))
    def check(given_: list[str]) -> None:
        survives(lambda: Policy().with_settings(given_))

    check()


def check_rows(folder: Path, num: int) -> None:
    rows = {"id": 1, "text": "a", "prompt": "b", "completion": "c", "labels": ["d"]}
    path = folder / "rows.jsonl"

    @_settings(num)
    @given(st.lists(hostile.tampered(rows), max_size=4))
    def check(lines: list[bytes]) -> None:
        path.write_bytes(b"\n".join(lines))
        inputs = Inputs(find_files([path]), SCORED_KEYS)
        survives(lambda: list(inputs.rows(Position())))

    check()


def check_manifest(folder: Path, num: int) -> None:
    """What is kept of a job that was not finished, and of one that was."""
    rows = write_rows(folder / "rows.jsonl", 10)
    output = folder / "out.jsonl"
    run_job(rows, output)
    path = output.with_name("out.jsonl.manifest.json")
    seed = json.loads(path.read_bytes())
    store = folder / "begun.jsonl.parts"
    store.mkdir()

    def begun() -> None:
        with PartStore(folder / "begun.jsonl", penstock_disk()) as parts:
            parts.manifest()

    @_settings(num)
    @given(hostile.tampered(seed), hostile.tampered(seed["manifest"]))
    def check(finished: bytes, manifest: bytes) -> None:
        path.write_bytes(finished)
        survives(lambda: run_job(rows, output))
        (store / "manifest.json").write_bytes(manifest)
        survives(begun)

    check()


def penstock_disk() -> Any:
    from penstock.io.disk import Disk

    return Disk()


def check_side_file(folder: Path, num: int) -> None:
    path = folder / "checksums.json"
    seed = {"algorithm": "xxh3_64", "tensors": {"a": "0123", "b": "4567"}}

    @_settings(num)
    @given(hostile.tampered(seed))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        survives(lambda: read_side_file(path))

    check()


def _settings(num: int) -> settings:
    return settings(
        max_examples=num,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)


ALONE = {
    "policy": check_policy,
    "settings": check_settings,
    "rows": check_rows,
    "manifest": check_manifest,
    "side file": check_side_file,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_a_checkpoints_file_is_used_or_refused(
    kind: str, saved: Path, fresh: Path
) -> None:
    check_checkpoint(saved, fresh, kind, FEW)


def test_a_header_is_used_or_refused(saved: Path, fresh: Path) -> None:
    check_header(saved, fresh, 4 * FEW)


@pytest.mark.parametrize("kind", ALONE)
def test_a_file_of_the_users_is_used_or_refused(kind: str, fresh: Path) -> None:
    ALONE[kind](fresh, FEW)


@pytest.mark.whole
@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_four_hundred_changes_of_each_file_of_a_checkpoint(
    kind: str, saved: Path, fresh: Path
) -> None:
    check_checkpoint(saved, fresh, kind, 400)


@pytest.mark.whole
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["header", *ALONE])
def test_four_hundred_changes_of_each_other_file(
    kind: str, saved: Path, fresh: Path
) -> None:
    if kind == "header":
        check_header(saved, fresh, 400)
    else:
        ALONE[kind](fresh, 400)
