"""Whatever stands in a file that somebody gives us ends in a result or in a sentence:
no traceback, no process that hangs or takes all memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import hostile
import penstock
from checkpoint import make_checkpoint
from hostile import survives
from jobs import run_job, write_rows
from penstock import Policy
from penstock.io.checkpoint.index import INDEX_FILE, open_checkpoint
from penstock.io.readers.checksums import read_side_file
from penstock.offload.configs import hf_config
from penstock.offload.files.durable import DurableFiles
from penstock.offload.files.inputs import Inputs
from penstock.offload.files.json_rows import SCORED_KEYS
from penstock.offload.files.parts import Position
from penstock.offload.files.sources import find_files
from penstock.offload.jobs.part_store import PartStore
from penstock.offload.machines.machine import Machine
from penstock.offload.rows.text import load_tokenizer, tokenize_all
from penstock.offload.tasks.pooling import pooled

ROWS = [{"id": 1, "text": "import os def foo return"}]
POLICY = """extends: laptop-16gb-ram-nvme
device_memory: 2MiB
placement: {"layers\\\\.[0-3]$": device}
links: {disk: {bandwidth: 500MB}}
io: {threads: 2, chunk: 1MiB}
"""
FEW, MANY, PARTS = 6, 100, 4
"""Changes of each file: in the suite, and in each part of a whole run."""
Surface = tuple[st.SearchStrategy[Any], Callable[[Any], None]]
"""What may be given, and what reads it."""


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


@pytest.fixture(scope="module")
def streamed(saved: Path) -> Iterator[Any]:
    """One model for what is read of a checkpoint beside the model itself."""
    with penstock.load(saved, {"device_memory": "2MiB"}) as model:
        yield model


def loaded(model: Any, folder: Path) -> None:
    with penstock.load(folder, {"device_memory": "2MiB"}) as fresh:
        list(penstock.score(fresh, ROWS))


def pooled_as_said(model: Any, folder: Path) -> None:
    model.config.name_or_path = str(folder)
    pooled(model, "auto", None)


def generated(model: Any, folder: Path) -> None:
    hf_config.set_generation(model, folder, False)
    tokenizer = load_tokenizer(folder)
    list(penstock.generate(model, ROWS, max_new_tokens=2, tokenizer=tokenizer))


def tokenized(model: Any, folder: Path) -> None:
    tokenize_all(load_tokenizer(folder), ROWS)


FILES: dict[str, tuple[str, Callable[[Any, Path], object]]] = {
    "config": ("config.json", loaded),
    "generation": ("generation_config.json", generated),
    "tokenizer": ("tokenizer.json", tokenized),
    "tokenizer settings": ("tokenizer_config.json", tokenized),
    "index": (INDEX_FILE, lambda model, folder: open_checkpoint(folder)),
    "modules": ("modules.json", pooled_as_said),
    "pooling": ("pooling/config.json", pooled_as_said),
}


def of_checkpoint(kind: str, model: Any, saved: Path, folder: Path) -> Surface:
    name, read = FILES[kind]
    path = saved / name
    content = json.loads(path.read_bytes()) if path.exists() else {}
    shutil.copytree(saved, folder, dirs_exist_ok=True)

    def check(changed: bytes) -> None:
        (folder / name).write_bytes(changed)
        survives(lambda: read(model, folder))

    return hostile.tampered(content), check


def of_header(saved: Path, folder: Path) -> Surface:
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    path = sorted(folder.glob("*.safetensors"))[0]
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]

    def whole(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + rest

    def check(changed: bytes) -> None:
        path.write_bytes(changed)
        survives(lambda: open_checkpoint(folder))

    broken = hostile.broken(content[: 8 + length]).map(lambda head: head + rest)
    return st.one_of(hostile.tampered(header).map(whole), broken), check


def of_policy(folder: Path) -> Surface:
    path = folder / "policy.yaml"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        survives(lambda: Policy.from_yaml(path))
        survives(lambda: Machine.from_yaml(path))

    texts = st.one_of(
        hostile.broken(POLICY.encode()),
        hostile.tampered(Policy().model_dump(mode="json")),
        st.text(max_size=60).map(lambda text: text.encode(errors="replace")),
    )
    return texts, check


def of_settings(folder: Path) -> Surface:
    keys = st.sampled_from([*Policy.model_fields, "io.threads", "kv.tier", "a", "io.a"])
    hard = st.sampled_from(hostile.VALUES).map(json.dumps)
    values = st.one_of(st.text(max_size=20), hard)

    def check(given_: list[str]) -> None:
        survives(lambda: Policy().with_settings(given_))

    return st.lists(st.builds("{}={}".format, keys, values), max_size=4), check


def of_rows(folder: Path) -> Surface:
    row = {"id": 1, "text": "a", "prompt": "b", "completion": "c", "labels": ["d"]}
    path = folder / "rows.jsonl"

    def check(lines: list[bytes]) -> None:
        path.write_bytes(b"\n".join(lines))
        inputs = Inputs(find_files([path]), SCORED_KEYS)
        survives(lambda: list(inputs.rows(Position())))

    return st.lists(hostile.tampered(row), max_size=4), check


def of_manifests(folder: Path) -> Surface:
    """What is kept of a job that was not finished, and of one that was."""
    rows = write_rows(folder / "rows.jsonl", 10)
    output = folder / "out.jsonl"
    run_job(rows, output)
    path = output.with_name("out.jsonl.manifest.json")
    content = json.loads(path.read_bytes())
    store = folder / "begun.jsonl.parts"
    store.mkdir()

    def begun() -> None:
        with PartStore(folder / "begun.jsonl", DurableFiles()) as parts:
            parts.manifest()

    def check(changed: tuple[bytes, bytes]) -> None:
        finished, manifest = changed
        path.write_bytes(finished)
        survives(lambda: run_job(rows, output))
        (store / "manifest.json").write_bytes(manifest)
        survives(begun)

    manifests = hostile.tampered(content["manifest"])
    return st.tuples(hostile.tampered(content), manifests), check


def of_side_file(folder: Path) -> Surface:
    path = folder / "checksums.json"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        survives(lambda: read_side_file(path))

    known = {"algorithm": "xxh3_64", "tensors": {"a": "0123", "b": "4567"}}
    return hostile.tampered(known), check


ALONE: dict[str, Callable[[Path], Surface]] = {
    "policy": of_policy,
    "settings": of_settings,
    "rows": of_rows,
    "manifests": of_manifests,
    "side file": of_side_file,
}


def tried(surface: Surface, num: int, part: int = 0) -> None:
    """`num` changes, the same ones in each run."""
    changes, check = surface

    @seed(part)
    @settings(
        max_examples=num,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(changes)
    def run(changed: Any) -> None:
        check(changed)

    run()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_a_checkpoint_is_used_or_refused(
    kind: str, streamed: Any, saved: Path, folder: Path
) -> None:
    tried(of_checkpoint(kind, streamed, saved, folder), FEW)


def test_a_header_is_used_or_refused(saved: Path, folder: Path) -> None:
    tried(of_header(saved, folder), 4 * FEW)


@pytest.mark.parametrize("kind", ALONE)
def test_a_file_of_the_users_is_used_or_refused(kind: str, folder: Path) -> None:
    tried(ALONE[kind](folder), FEW)


@pytest.mark.whole
@pytest.mark.slow
@pytest.mark.parametrize("part", range(1, PARTS + 1))
@pytest.mark.parametrize("kind", [*FILES, "header", *ALONE])
def test_a_hundred_changes_of_each_file(
    kind: str, part: int, streamed: Any, saved: Path, folder: Path
) -> None:
    if kind in FILES:
        surface = of_checkpoint(kind, streamed, saved, folder)
    else:
        surface = ALONE[kind](folder) if kind in ALONE else of_header(saved, folder)
    tried(surface, MANY, part)
