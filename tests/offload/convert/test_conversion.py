"""A conversion goes on where it was killed, needs little memory, and refuses in one
sentence what cannot be done."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import forked_python
from jobs import FragileDisk, Killed
from penstock.io.checkpoint.index import open_checkpoint
from penstock.io.errors import (
    CheckpointError,
    MachineError,
    OutputError,
    PenstockError,
    UsageError,
)
from penstock.offload.convert import conversion
from penstock.offload.convert.conversion import Conversion
from penstock.offload.convert.schemes import TargetFormat
from penstock.offload.files.durable import DurableFiles
from quantised import original

pytestmark = pytest.mark.usefixtures("own_processes", "no_leaks")

TARGETS: tuple[TargetFormat, ...] = ("int4", "int8", "fp8", "lossless")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In several files, with a tokenizer's files and others beside them."""
    folder = tmp_path_factory.mktemp("model")
    whole = original(tmp_path_factory.mktemp("whole"), "llama")
    tensors = load_file(whole / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for i in range(3):
        file = f"model-0000{i + 1}-of-00003.safetensors"
        part = {name: tensors[name] for name in names[i::3]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(whole / "config.json", folder)
    shutil.copy(whole / "generation_config.json", folder)
    for name in ("tokenizer.json", "modeling_own.py", "LICENSE", "old.bin", "a.onnx"):
        (folder / name).write_text("{}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


def conversion_of(
    model: Path, out: Path, target: TargetFormat = "int8", **options: Any
) -> Conversion:
    ignore = "" if target == "lossless" else "lm_head"
    return Conversion(model, out, target, **{"group": 32, "ignore": ignore, **options})


def convert(
    model: Path, out: Path, target: TargetFormat = "int8", **options: Any
) -> None:
    conversion_of(model, out, target, **options).run(lambda done, total: None)


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def killed_at(instant: int) -> tuple[Callable[[int, int], None], FragileDisk]:
    """A progress and a disk that end the process at an instant: they count together,
    and one half of the instants lies within the writing of weights."""
    disk, calls = FragileDisk(instant // 2), 0

    def progress(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if instant % 2 and calls > instant // 2:
            raise Killed

    return progress, disk


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_killed_at_any_instant_it_goes_on_to_the_same_bytes(
    target: TargetFormat, model: Path, tmp_path: Path
) -> None:
    convert(model, tmp_path / "whole", target)
    wanted = content(tmp_path / "whole")
    rng, kills, out = random.Random(0), 0, tmp_path / "out"
    while kills < 20:
        shutil.rmtree(out, ignore_errors=True)
        is_done = False
        while not is_done:
            progress, disk = killed_at(rng.randrange(2, 160))
            try:
                conversion_of(model, out, target).run(progress, disk)
                is_done = True
            except Killed:
                kills += 1
                assert not (out / "config.json").exists() or content(out) == wanted
        assert content(out) == wanted
    convert(model, out, target)
    assert content(out) == wanted


def test_what_is_copied(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(model, out)
    assert {path.name for path in out.iterdir()} == {
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        "model.safetensors.index.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "modeling_own.py",
        "LICENSE",
        "1_Pooling",
        "conversion.json",
    }
    before, after = (json.loads((d / "config.json").read_text()) for d in (model, out))
    after.pop("quantization_config")
    assert after == before


@pytest.mark.parametrize("target", TARGETS)
def test_tensors_of_any_size_are_aligned(target: TargetFormat, tmp_path: Path) -> None:
    """As torch needs them; and the library reads what was written."""
    folder = original(tmp_path / "model", "llama")
    tensors = load_file(folder / "model.safetensors")
    odd = {
        "odd.bytes": torch.arange(13, dtype=torch.uint8),
        "odd.halves": torch.arange(3).half(),
        "odd.empty": torch.empty(0, 4),
        "odd.scalar": torch.tensor(7.0),
        "odd.whole": torch.arange(5),
    }
    save_file({**tensors, **odd}, folder / "model.safetensors", {"format": "pt"})
    convert(folder, tmp_path / "out", target)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in odd.items():
        assert torch.equal(stored[name], tensor)
    for entry in open_checkpoint(tmp_path / "out").entries.values():
        assert entry.offset % entry.dtype.itemsize == 0, entry.name


def test_a_weight_that_does_not_pack_well_is_left(tmp_path: Path) -> None:
    folder = original(tmp_path / "model", "llama")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    spread = torch.exp2(torch.randint(-60, 60, tensors[name].shape)).bfloat16()
    tensors[name] = spread
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    convert(folder, tmp_path / "out", "lossless")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored[name], spread)
    assert f"{name}_lossless" not in stored
    assert f"{name.replace('up', 'gate')}_lossless" in stored


MEASURED = """
import sys
from pathlib import Path
from penstock.offload.convert.conversion import Conversion
from penstock.offload.weights import hf
from penstock.io.checkpoint.index import open_checkpoint

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(l.split()[1]) for l in lines if l.startswith("VmHWM")) << 10

model, out, target = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
hf.build(open_checkpoint(model), "auto")
Path("/proc/self/clear_refs").write_text("5")
before = peak()
Conversion(model, out, target, group=32, ignore="").run(lambda done, total: None)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["int4", "lossless"])
def test_memory_is_that_of_a_few_rows(target: TargetFormat, tmp_path: Path) -> None:
    """Of tensors of 64 MiB each."""
    folder = original(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    config.update(intermediate_size=1 << 19, num_hidden_layers=1)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: t for name, t in tensors.items() if ".layers.1." not in name}
    wide = (torch.randn(1 << 19, 64) / 50).bfloat16()
    for name, weight in (("up", wide), ("gate", wide), ("down", wide.view(64, -1))):
        tensors[f"model.layers.0.mlp.{name}_proj.weight"] = weight.clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    done = forked_python.run("-c", MEASURED, folder, tmp_path / "out", target)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100 << 20


def edited(model: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def refused(
    model: Path, out: Path, words: str, error: type[PenstockError], **options: Any
) -> None:
    there = content(out) if out.exists() else None
    with pytest.raises(error, match=words) as found:
        convert(model, out, **options)
    assert "\n" not in str(found.value)
    assert (content(out) if out.exists() else None) == there


def test_a_folder_with_something_else_is_refused(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    refused(model, out, r"holds something else \(thesis.txt\)", UsageError)
    refused(model, out / "thesis.txt", "is no folder", UsageError)
    refused(model, model, "is the model itself", UsageError)
    (tmp_path / "link").symlink_to(model)
    refused(model, tmp_path / "link", "is the model itself", UsageError)
    for inside in (
        model / "out",
        model / "1_Pooling" / "out",
        tmp_path / "link" / "out",
    ):
        refused(model, inside, "is in the folder of the model", UsageError)


@pytest.mark.parametrize(
    ("target", "part"),
    [("int4", "_scale"), ("fp8", "_scale"), ("lossless", "_escapes")],
)
def test_names_that_would_be_there_twice_are_refused(
    target: TargetFormat, part: str, model: Path, tmp_path: Path
) -> None:
    """In other files, too."""
    other = edited(model, tmp_path / "other")
    name = "model.layers.0.mlp.up_proj.weight"
    index = other / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    file = next(each for each in sorted(set(files.values())) if each != files[name])
    tensors = {**load_file(other / file), f"{name}{part}": torch.zeros(3)}
    save_file(tensors, other / file, {"format": "pt"})
    files[f"{name}{part}"] = file
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    words = rf"{name}' would both be stored as|'{name}{part}' would both be stored as"
    refused(other, tmp_path / "out", words, CheckpointError, target=target)
    assert not (tmp_path / "out").exists()


def test_another_conversion_is_refused(model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "out", "int4")
    refused(model, tmp_path / "out", "another conversion .format 'int4'", UsageError)
    words = "another conversion .group 32"
    for group in (16, 64):
        refused(model, tmp_path / "out", words, UsageError, target="int4", group=group)
    other = edited(model, tmp_path / "other", vocab_size=96, new_key=1)
    refused(other, tmp_path / "out", "another conversion", UsageError, target="int4")
    (tmp_path / "out" / "conversion.json").write_text("{}")
    refused(model, tmp_path / "out", "cannot be used", UsageError, target="int4")


def test_a_quantised_model_is_refused(model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "once", "int8")
    words = r"is quantised already \(compressed-tensors\)"
    refused(tmp_path / "once", tmp_path / "out", words, UsageError)
    convert(model, tmp_path / "packed", "lossless")
    words = r"is quantised already \(penstock\)"
    refused(tmp_path / "packed", tmp_path / "out", words, UsageError)
    beside = edited(model, tmp_path / "beside")
    (beside / "hf_quant_config.json").write_text("{}")
    words = r"is quantised already \(hf_quant_config.json"
    refused(beside, tmp_path / "out", words, UsageError)


def with_dtype(model: Path, folder: Path, dtype: torch.dtype) -> Path:
    shutil.copytree(model, folder)
    for path in folder.glob("*.safetensors"):
        tensors = {name: t.to(dtype) for name, t in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    return folder


def test_dtypes_that_cannot_be_converted_are_refused(
    model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    wide = with_dtype(model, tmp_path / "wide", torch.float64)
    refused(wide, out, "is kept as float64, and only", PenstockError)
    half = with_dtype(model, tmp_path / "half", torch.float16)
    words = "no matrix of bfloat16.*its tensors are float16"
    refused(half, out, words, UsageError, target="lossless")
    convert(half, out, "int8")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "int4", "group": 12}, "--group 12: groups have a multiple of 8"),
        ({"target": "int4", "group": 0}, "--group 0: groups have"),
        ({"target": "int4", "group": 1024}, "no linear layer that can be stored as"),
        ({"ignore": "("}, r"--ignore '\(' is no regex"),
        ({"ignore": "proj|lm_head"}, "no linear layer that can be stored as int8"),
    ],
)
def test_options_that_make_no_sense(
    options: dict[str, Any], words: str, model: Path, tmp_path: Path
) -> None:
    refused(model, tmp_path / "out", words, UsageError, **options)


def test_code_of_the_checkpoint_does_not_run(model: Path, tmp_path: Path) -> None:
    own = {"model_type": "own", "auto_map": {"AutoConfig": "modeling_own.Config"}}
    folder = edited(model, tmp_path / "own", **own)
    (folder / "modeling_own.py").write_text("raise SystemExit('it ran')")
    refused(folder, tmp_path / "out", "needs code that comes with", PenstockError)


def test_numbers_that_are_none(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        name = "model.layers.1.mlp.up_proj.weight"
        if name in tensors:
            tensors[name][3, 4] = torch.nan
            save_file(tensors, path, {"format": "pt"})
    with pytest.raises(PenstockError, match=r"infinities or NaNs, .*1.mlp.up_proj$"):
        convert(folder, tmp_path / "out", "fp8")
    convert(folder, tmp_path / "packed", "lossless")


def test_a_disk_without_room(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 12_345

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage)
    words = r"needs 1\d\d,\d{3} bytes, and its drive has 12,345 free"
    refused(model, tmp_path / "out", words, MachineError)


def test_a_disk_that_fills_up(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match=r"no room is left.*the same command again"):
        convert(model, tmp_path / "out")
    monkeypatch.undo()
    convert(model, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


def test_a_file_that_changes_meanwhile(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    path = folder / "model-00002-of-00003.safetensors"

    def change(done: int, total: int) -> None:
        os.utime(path, (1, 1))

    made = conversion_of(folder, tmp_path / "out")
    with pytest.raises(PenstockError, match="has changed while it was converted"):
        made.run(change)
    assert not (tmp_path / "out" / path.name).exists()


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    """A folder that another process is writing."""
    out = tmp_path / "out"
    out.mkdir()
    with conversion._locked(out):
        yield out


def test_two_processes_cannot_write_one_folder(held: Path, model: Path) -> None:
    refused(model, held, "another process is writing", UsageError)


def test_a_link_cannot_be_made_where_a_file_is(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        convert(model, tmp_path / "file" / "out")


@pytest.mark.slow
def test_the_command(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("convert", model, out, "--to", "int4", "--group", "32")
    done = forked_python.run(*forked_python.COMMAND, *words)
    assert (done.returncode, done.stdout.strip()) == (0, str(out)), done.stderr
    assert "14 of 21 tensors are in int4: " in done.stderr
    again = forked_python.run(*forked_python.COMMAND, *words)
    assert again.returncode == 0
    assert "all was there: 14 of 21 tensors" in again.stderr
    wrong = forked_python.run(*forked_python.COMMAND, *words[:-1], "30")
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1, wrong.stderr


def test_disk_steps_are_those_of_durable_files(model: Path, tmp_path: Path) -> None:
    """A failing rename is one sentence, and nothing is lost."""

    class Failing(DurableFiles):
        def rename(self, source: Path, target: Path) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(OutputError, match=r"cannot write .*run the same command"):
        conversion_of(model, tmp_path / "out").run(lambda *_: None, Failing())
