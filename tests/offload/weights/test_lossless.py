"""Any part of a packed weight fills any part of a parameter; files that lie are
refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_loader import opened

import penstock
from checkpoints import random_floats, same_bits
from penstock import Policy
from penstock.io.checkpoint.index import SINGLE_FILE, open_checkpoint
from penstock.io.codecs.computed import Computed
from penstock.io.codecs.lossless import Lossless
from penstock.io.codecs.packed import escapes, pack
from penstock.io.errors import CheckpointError, PenstockError, UsageError
from penstock.io.weights.recipe import Recipe, TensorSlice, View, computed
from penstock.offload.convert.conversion import Conversion
from penstock.offload.weights import hf
from penstock.offload.weights.lossless import LosslessFiles
from quantised import Tensors, original

pytestmark = pytest.mark.usefixtures("no_leaks")

POLICY = Policy(device_memory="1MiB", resident_below=1)
ROWS, COLUMNS = 2000, 96
BLOCK = 682
"""Rows of a block of so many columns."""


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    made = random_floats(torch.bfloat16, (ROWS, COLUMNS))
    made.view(-1)[::501] = 1e-30
    return made


def files_of(folder: Path, weight: torch.Tensor) -> LosslessFiles:
    made, blocks = pack(weight.view(-1, weight.shape[-1]))
    found = escapes(blocks)
    stored = {
        "it_lossless": made.view(*weight.shape[:-1], -1),
        "beside": torch.ones(1),
        **({} if found is None else {"it_escapes": found}),
    }
    save_file(stored, folder / SINGLE_FILE)
    return LosslessFiles(open_checkpoint(folder))


def made_of(
    files: LosslessFiles, source: View, target: View, shape: tuple[int, ...]
) -> tuple[torch.Tensor, set[type]]:
    """The parameter of `shape` whose part `target` is `source` of the weight, and the
    kinds of codecs that made it."""
    part = TensorSlice(files.checkpoint.entries["it"], source, target)
    recipe = Recipe("p", shape, torch.bfloat16, (part,))
    return loaded(files, recipe)


def loaded(files: LosslessFiles, recipe: Recipe) -> tuple[torch.Tensor, set[type]]:
    found = files.recipes({"p": recipe})["p"]
    kinds = {type(each.codec) for each in found.slices}
    stored = open_checkpoint(files.checkpoint.folder)
    with opened(stored, [found], bounce_bytes=4096) as rig:
        return rig.load()["p"].clone(), kinds


@pytest.mark.parametrize(
    ("start", "end", "kind"),
    [
        (0, ROWS, Lossless),
        (0, 30, Lossless),
        (BLOCK, BLOCK + 700, Lossless),
        (2 * BLOCK, ROWS, Lossless),
        (5, 900, Computed),
    ],
)
def test_ranges_of_rows(
    start: int, end: int, kind: type, weight: torch.Tensor, tmp_path: Path
) -> None:
    files = files_of(tmp_path, weight)
    shape = (end - start, COLUMNS)
    source = View(start * COLUMNS, shape, (COLUMNS, 1))
    made, kinds = made_of(files, source, View.whole(shape), shape)
    assert kinds == {kind}
    assert same_bits(made, weight[start:end])


def test_a_transposed_target(weight: torch.Tensor, tmp_path: Path) -> None:
    files = files_of(tmp_path, weight)
    target = View(0, (ROWS, COLUMNS), (1, ROWS))
    source = View.whole((ROWS, COLUMNS))
    made, kinds = made_of(files, source, target, (COLUMNS, ROWS))
    assert kinds == {Lossless}
    assert same_bits(made, weight.t().contiguous())


def test_a_strided_part(weight: torch.Tensor, tmp_path: Path) -> None:
    files = files_of(tmp_path, weight)
    shape = (ROWS // 2, COLUMNS)
    source = View(COLUMNS, shape, (2 * COLUMNS, 1))
    made, kinds = made_of(files, source, View.whole(shape), shape)
    assert kinds == {Computed}
    assert same_bits(made, weight[1::2].contiguous())


@pytest.mark.parametrize("has_escapes", [False, True])
@pytest.mark.parametrize("is_turned", [False, True])
def test_stacked_matrices(
    is_turned: bool, has_escapes: bool, weight: torch.Tensor, tmp_path: Path
) -> None:
    if not has_escapes:
        weight = torch.rand(weight.shape).add_(1).bfloat16()
    stack = weight.view(4, ROWS // 4, COLUMNS)
    files = files_of(tmp_path, stack)
    assert files.checkpoint.entries["it"].shape == tuple(stack.shape)
    shape = (4, COLUMNS, ROWS // 4) if is_turned else tuple(stack.shape)
    wanted = stack.transpose(1, 2).contiguous() if is_turned else stack
    whole = torch.empty(shape, device="meta")
    target = View.of(whole.transpose(1, 2) if is_turned else whole)
    made, kinds = made_of(files, View.whole(tuple(stack.shape)), target, shape)
    assert kinds == {Computed if is_turned and has_escapes else Lossless}
    assert same_bits(made, wanted)


def test_a_function_gets_whole_weights(weight: torch.Tensor, tmp_path: Path) -> None:
    files = files_of(tmp_path, weight)
    entries = [files.checkpoint.entries[name] for name in ("it", "beside")]

    def compute(stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return stored["it"].t() * stored["beside"]

    recipe = computed("p", (COLUMNS, ROWS), torch.bfloat16, compute, entries)
    made, kinds = loaded(files, recipe)
    assert kinds == {Computed}
    assert same_bits(made, weight.t().contiguous())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint."""
    source = original(tmp_path_factory.mktemp("model"), "llama")
    out = tmp_path_factory.mktemp("lossless")
    Conversion(source, out, "lossless", group=0, ignore="").run(lambda *_: None)
    return out


NAME = "model.layers.1.mlp.up_proj.weight"
ALL = f"{NAME}_lossless"


def without_rows(tensors: Tensors) -> None:
    del tensors[ALL]


def with_other_rows(tensors: Tensors) -> None:
    tensors[ALL] = tensors[ALL].to(torch.int32)


def with_short_rows(tensors: Tensors) -> None:
    tensors[ALL] = tensors[ALL][:, 3:].clone()


def with_rows_of_no_length(tensors: Tensors) -> None:
    tensors[ALL] = tensors[ALL][:, 2:].clone()


def with_many_escapes(tensors: Tensors) -> None:
    tensors[f"{NAME}_escapes"] = torch.zeros(5, 2, dtype=torch.int32)


def with_other_escapes(tensors: Tensors) -> None:
    tensors[f"{NAME}_escapes"] = torch.zeros(1, 2, dtype=torch.int64)


def with_both(tensors: Tensors) -> None:
    tensors[NAME] = torch.zeros(128, 64)


BAD: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "no_rows": (without_rows, f"lacks {NAME}, which"),
    "other_rows": (with_other_rows, "holds no packed weight"),
    "short_rows": (with_short_rows, r"\[128, 62\], but the model's"),
    "rows_of_no_length": (with_rows_of_no_length, "holds no packed weight"),
    "many_escapes": (with_many_escapes, "has not the 1 rows of int32"),
    "other_escapes": (with_other_escapes, "has not the 1 rows of int32"),
    "both": (with_both, "is there, and .* beside it"),
}


def copied(folder: Path, out: Path, **section: Any) -> Tensors:
    """Writes the config to `out`, with changes of the section; the tensors."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(section)
    (out / "config.json").write_text(json.dumps(config))
    return load_file(folder / SINGLE_FILE)


@pytest.mark.parametrize("bad", BAD)
def test_what_does_not_go_together_is_one_sentence(
    bad: str, folder: Path, tmp_path: Path
) -> None:
    change, words = BAD[bad]
    tensors = copied(folder, tmp_path)
    change(tensors)
    save_file(tensors, tmp_path / SINGLE_FILE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=words) as refused:
        penstock.load(tmp_path, POLICY)
    assert NAME in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("section", [{"version": 2}, {"format": "other"}])
def test_another_version_is_refused_by_name(
    section: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    tensors = copied(folder, tmp_path, **section)
    save_file(tensors, tmp_path / SINGLE_FILE, {"format": "pt"})
    with pytest.raises(UsageError, match=r"this version reads .*'version': 1"):
        penstock.load(tmp_path, POLICY)


def test_the_config_alone_does_not_say_how_many_bytes(
    folder: Path, tmp_path: Path
) -> None:
    copied(folder, tmp_path)
    with pytest.raises(PenstockError, match="is quantised and has no weights"):
        hf.imagine(tmp_path, "auto")
