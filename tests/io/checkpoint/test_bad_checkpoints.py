"""What is wrong with a checkpoint is said by `penstock.load`, and nothing is left."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import penstock
import zoo
from checkpoints import write_index
from conftest import mapped_bytes
from penstock import Policy
from penstock.io.checkpoint.index import INDEX_FILE, SINGLE_FILE
from penstock.io.errors import (
    CheckpointChangedError,
    CheckpointError,
    DoesNotFitError,
    PenstockError,
    ReadError,
    UsageError,
)

pytestmark = pytest.mark.usefixtures("no_leaks")

PAGE = 4096


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small llama in several shards; not to be changed."""
    folder = tmp_path_factory.mktemp("llama")
    zoo.save_checkpoint("llama", folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "llama"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def drop_tensors(folder: Path, word: str) -> None:
    """Saves the checkpoint again without the tensors that have `word` in their name."""
    weight_map: dict[str, str] = {}
    for path in shards(folder):
        kept = {k: v.clone() for k, v in load_file(path).items() if word not in k}
        save_file(kept, path)
        weight_map |= dict.fromkeys(kept, path.name)
    write_index(folder, weight_map)


def remove_weights(folder: Path) -> None:
    for path in [*shards(folder), folder / INDEX_FILE]:
        path.unlink()


def change_header(folder: Path, old: bytes, new: bytes) -> None:
    """Replaces text in the header of the first shard that has it."""
    for path in shards(folder):
        content = path.read_bytes()
        if old in content:
            path.write_bytes(content.replace(old, new, 1))
            return
    raise AssertionError(f"no header holds {old!r}")


def truncate(path: Path, by: int = 1) -> None:
    os.truncate(path, path.stat().st_size - by)


def reshape_tensor(folder: Path) -> None:
    """The embedding as a matrix of another shape and as many bytes."""
    for path in shards(folder):
        tensors = {k: v.clone() for k, v in load_file(path).items()}
        for name in tensors:
            if "embed_tokens" in name:
                tensors[name] = tensors[name].reshape(-1, 96)
        save_file(tensors, path)


Damage = Callable[[Path], object]
DAMAGES: dict[str, tuple[Damage, type[PenstockError], list[str]]] = {
    "no_folder": (shutil.rmtree, CheckpointError, ["is not a folder"]),
    "missing_shard": (
        lambda f: shards(f)[1].unlink(),
        CheckpointError,
        ["model-00002-of", "is missing", "download or copy"],
    ),
    "truncated_shard": (
        lambda f: truncate(shards(f)[1]),
        CheckpointError,
        ["model-00002-of", "is truncated"],
    ),
    "empty_shard": (
        lambda f: shards(f)[0].write_bytes(b""),
        CheckpointError,
        ["model-00001-of", "is too short"],
    ),
    "lying_shape": (
        lambda f: change_header(f, b'"shape":[160,48]', b'"shape":[160,49]'),
        CheckpointError,
        [".safetensors", "contradicts itself"],
    ),
    "lying_dtype": (
        lambda f: change_header(f, b'"dtype":"F32"', b'"dtype":"F16"'),
        CheckpointError,
        [".safetensors", "contradicts itself"],
    ),
    "unknown_dtype": (
        lambda f: change_header(f, b'"dtype":"F32"', b'"dtype":"F33"'),
        CheckpointError,
        [".safetensors", "no dtype F33"],
    ),
    "index_of_an_absent_file": (
        lambda f: write_index(f, {"lm_head.weight": "away.safetensors"}),
        CheckpointError,
        ["away.safetensors is missing"],
    ),
    "index_of_an_absent_tensor": (
        lambda f: write_index(f, {"more": shards(f)[0].name}),
        CheckpointError,
        [INDEX_FILE, "'more' is in"],
    ),
    "no_weights": (
        remove_weights,
        CheckpointError,
        [f"has no {SINGLE_FILE}"],
    ),
    "no_config": (
        lambda f: (f / "config.json").unlink(),
        CheckpointError,
        ["has no config.json"],
    ),
    "broken_config": (
        lambda f: (f / "config.json").write_text('{"model_type": "lla'),
        CheckpointError,
        ["config.json"],
    ),
    "empty_config": (
        lambda f: (f / "config.json").write_text("{}"),
        CheckpointError,
        ["config.json"],
    ),
    "unknown_model_type": (
        lambda f: change_config(f, model_type="lama"),
        CheckpointError,
        ["config.json", "lama"],
    ),
    "unknown_architecture": (
        lambda f: change_config(f, architectures=["LamaForCausalLM"]),
        UsageError,
        ["config.json", "LamaForCausalLM", "penstock.wrap"],
    ),
    "no_architecture": (
        lambda f: change_config(f, architectures=None),
        UsageError,
        ["config.json", "names the architectures []"],
    ),
    "architecture_is_no_model": (
        lambda f: change_config(f, architectures=["LlamaConfig"]),
        UsageError,
        ["config.json", "LlamaConfig"],
    ),
    "quantised": (
        lambda f: change_config(f, quantization_config={"quant_method": "gptq"}),
        UsageError,
        ["is quantised (gptq)", "take a release in FP8"],
    ),
    "missing_tensor": (
        lambda f: drop_tensors(f, "layers.1.mlp.up_proj"),
        CheckpointError,
        ["lacks model.layers.1.mlp.up_proj.weight,", "LlamaForCausalLM"],
    ),
    "many_missing_tensors": (
        lambda f: drop_tensors(f, "mlp"),
        CheckpointError,
        ["lacks model.layers.0.mlp.down_proj.weight", "and 6 more", "incomplete"],
    ),
    "wrong_shape": (
        reshape_tensor,
        CheckpointError,
        ["embed_tokens", "has shape [80, 96]", "has [160, 48]"],
    ),
    "config_of_another_size": (
        lambda f: change_config(f, intermediate_size=80),
        CheckpointError,
        ["config.json is of another model"],
    ),
    "config_is_a_list": (
        lambda f: (f / "config.json").write_text("[]"),
        CheckpointError,
        ["config.json must hold an object"],
    ),
    "config_is_too_deep": (
        lambda f: (f / "config.json").write_text('{"a":' * 100_000),
        CheckpointError,
        ["config.json is not valid JSON: it is too deep"],
    ),
    "layers_as_text": (
        lambda f: change_config(f, num_hidden_layers="4"),
        CheckpointError,
        ["config.json", "'num_hidden_layers'", "expected int"],
    ),
    "fewer_layers_than_none": (
        lambda f: change_config(f, num_hidden_layers=-1),
        CheckpointError,
        ["config.json: num_hidden_layers is -1, which is not a number"],
    ),
    "a_billion_layers": (
        lambda f: change_config(f, num_hidden_layers=10**9),
        CheckpointError,
        ["config.json: num_hidden_layers is 1,000,000,000"],
    ),
    "no_heads": (
        lambda f: change_config(f, num_attention_heads=0),
        CheckpointError,
        ["config.json"],
    ),
    "dtype_of_integers": (
        lambda f: change_config(f, dtype="int8"),
        CheckpointError,
        ["config.json: dtype is torch.int8"],
    ),
    "model_type_is_a_list": (
        lambda f: change_config(f, model_type=["llama"]),
        CheckpointError,
        ["config.json"],
    ),
    "architecture_of_another_kind": (
        lambda f: change_config(f, architectures=["BertModel"]),
        CheckpointError,
        ["config.json contradicts itself", "BertConfig"],
    ),
    "generation_config_is_a_list": (
        lambda f: (f / "generation_config.json").write_text("[]"),
        CheckpointError,
        ["generation_config.json must hold an object"],
    ),
    "config_with_more_layers": (
        lambda f: change_config(f, num_hidden_layers=4),
        CheckpointError,
        ["lacks model.layers.3", "more"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_is_named_and_nothing_is_left(damage: str, folder: Path) -> None:
    act, kind, says = DAMAGES[damage]
    act(folder)
    with pytest.raises(kind) as caught:
        penstock.load(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert [part for part in says if part not in message] == []
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dtype": "float33"}, "float33"),
        ({"dtype": "int8"}, "int8"),
        ({"dtype": "nn"}, "nn"),
    ],
)
def test_a_dtype_that_is_none_is_refused(
    settings: dict[str, str], says: str, saved: Path
) -> None:
    with pytest.raises(UsageError, match=f"{says}.* is not a floating dtype"):
        penstock.load(saved, Policy(**settings))


def least_memory(folder: Path, asked: int) -> int:
    with pytest.raises(DoesNotFitError) as caught:
        penstock.load(folder, Policy(device_memory=asked))
    message = str(caught.value)
    assert f"device_memory of {asked // PAGE * PAGE} bytes is too small" in message
    assert caught.value.exit_code == 3
    found = re.search(r"set device_memory to at least (\d+)$", message)
    assert found is not None
    return int(found[1])


def logits(model: Any, name: str) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(**zoo.inputs(name)).logits
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral", "gpt2"])
@pytest.mark.parametrize("asked", [1, 3 * PAGE, 8 * PAGE])
def test_the_least_memory_is_said_and_it_is_the_least(
    name: str, asked: int, tmp_path: Path
) -> None:
    zoo.save_checkpoint(name, tmp_path)
    least = least_memory(tmp_path, asked)
    with penstock.load(tmp_path, Policy(device_memory=least)) as model:
        streamed = logits(model, name)
        assert penstock.statistics(model).peak_device_bytes <= least
    assert torch.equal(streamed, logits(zoo.load(name, tmp_path), name))
    assert least_memory(tmp_path, least - PAGE) == least


def test_a_budget_of_broken_pages_is_rounded_down(saved: Path) -> None:
    least = least_memory(saved, 8 * PAGE)
    with pytest.raises(DoesNotFitError):
        penstock.load(saved, Policy(device_memory=least - 1))
    with penstock.load(saved, Policy(device_memory=least + PAGE - 1)) as model:
        assert penstock.statistics(model).device_memory_bytes == least


# While it is being streamed.


@contextmanager
def streaming(folder: Path) -> Iterator[Any]:
    """A model that has run once, and reads most of its weights again each time."""
    policy = Policy(device_memory=25 * PAGE, lookahead=1, io={"max_gap": PAGE})
    with penstock.load(folder, policy) as model:
        read = penstock.statistics(model).bytes_read["disk"]
        assert torch.isfinite(logits(model, "llama")).all()
        assert penstock.statistics(model).bytes_read["disk"] > read
        yield model


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def overwrite(path: Path) -> None:
    content = path.read_bytes()
    stat = path.stat()
    with path.open("r+b") as file:
        file.write(content[:-4] + b"abcd")
    os.utime(path, ns=(stat.st_mtime_ns, stat.st_mtime_ns + 1))


CHANGES: dict[str, Callable[[Path], None]] = {
    "appended": append,
    "overwritten": overwrite,
    "truncated": lambda path: truncate(path, 5000),
    "emptied": lambda path: os.truncate(path, 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_that_changes_while_it_is_streamed_is_an_error(
    change: str, folder: Path
) -> None:
    with streaming(folder) as model:
        for path in shards(folder):
            CHANGES[change](path)
        for _ in range(2):  # it stays an error, and is no deadlock
            with pytest.raises(CheckpointChangedError, match="load it again") as caught:
                logits(model, "llama")
            assert str(folder) in str(caught.value)
            assert re.search(r"unit '[\w. +]+': ", str(caught.value))


@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_that_changes_fails_every_micro_batch_of_a_sweep(
    change: str, folder: Path
) -> None:
    def run(inputs: dict[str, torch.Tensor], model: Any) -> torch.Tensor:
        result: torch.Tensor = model(**inputs).logits
        return result

    with streaming(folder) as model:
        for path in shards(folder):
            CHANGES[change](path)
        batches = [zoo.inputs("llama", seed=seed) for seed in range(3)]
        with (
            penstock.sweep(model) as sweep,
            pytest.raises(CheckpointChangedError, match="load it again"),
        ):
            sweep.map(lambda batch: run(batch, model), batches)


def test_a_shard_that_is_replaced_is_read_as_it_was(folder: Path) -> None:
    """An atomic replacement (a download, git) leaves the open file what it was."""
    with streaming(folder) as model:
        before = logits(model, "llama")
        for path in shards(folder):
            path.with_suffix(".new").write_bytes(b"another file")
            os.replace(path.with_suffix(".new"), path)
        assert torch.equal(logits(model, "llama"), before)


def test_a_shard_that_is_removed_is_still_read(folder: Path) -> None:
    with streaming(folder) as model:
        before = logits(model, "llama")
        shutil.rmtree(folder)
        assert torch.equal(logits(model, "llama"), before)


def test_an_error_of_the_device_passes_and_the_model_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def preadv(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with streaming(folder) as model:
        before = logits(model, "llama")
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", preadv)
            with pytest.raises(ReadError, match="Input/output error") as caught:
                logits(model, "llama")
            assert str(folder) in str(caught.value)
        # Nothing of the failed reads may be taken for weights.
        assert torch.equal(logits(model, "llama"), before)


def test_a_change_between_header_and_first_read_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from penstock.offload.weights import hf

    build = hf.build

    def slow_build(*args: Any, **options: Any) -> Any:
        skeleton = build(*args, **options)
        for path in shards(folder):
            append(path)
        return skeleton

    monkeypatch.setattr(hf, "build", slow_build)
    with pytest.raises(CheckpointChangedError, match="load it again"):
        penstock.load(folder)


def test_an_error_that_is_kept_keeps_no_weights(folder: Path) -> None:
    """A notebook keeps the last error: that must not keep gigabytes with it."""
    before = mapped_bytes()
    with streaming(folder) as model:
        for path in shards(folder):
            append(path)
        with pytest.raises(CheckpointChangedError) as caught:
            logits(model, "llama")
    assert mapped_bytes() == before
    assert "load it again" in str(caught.value)


@pytest.mark.parametrize("gather_rows", [1, "32MiB"])
def test_a_model_that_is_kept_after_it_was_closed_keeps_no_weights(
    gather_rows: int | str, saved: Path
) -> None:
    before = mapped_bytes()
    model = penstock.load(saved, Policy(gather_rows=gather_rows))
    logits(model, "llama")
    penstock.unwrap(model)
    assert mapped_bytes() == before
    assert "StreamedParameter" in repr(next(model.parameters()))
