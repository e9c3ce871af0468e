"""What is written is what the libraries read, and what Penstock streams of it."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_loader import opened
from torch import nn

import penstock
from checkpoints import same_bits
from penstock import Policy
from penstock.io.checkpoint.index import open_checkpoint
from penstock.io.codecs.lossless import Lossless
from penstock.io.codecs.scaled import Scaled
from penstock.offload.convert.conversion import Conversion, Converted
from penstock.offload.convert.schemes import TargetFormat
from penstock.offload.verify import verify
from penstock.offload.weights import hf
from quantised import Tensors, dequantised, original

HAS_LIBRARY = importlib.util.find_spec("compressed_tensors") is not None
needs_library = pytest.mark.skipif(
    not HAS_LIBRARY,
    reason='needs compressed-tensors: pip install "penstock[quantised]"',
)
pytestmark = pytest.mark.usefixtures("no_leaks")

POLICY = Policy(device_memory="1MiB", resident_below=1)
IDS = torch.arange(14).view(2, 7) + 3
CASES: dict[str, tuple[str, TargetFormat]] = {
    "int4": ("llama", "int4"),
    "int8": ("llama", "int8"),
    "fp8": ("llama", "fp8"),
    "int4 experts": ("qwen3_moe", "int4"),
    "fp8 experts": ("qwen3_moe", "fp8"),
    "int4 stacked": ("gpt_oss", "int4"),
}
LOSSLESS = ("llama", "qwen3_moe", "gpt_oss", "deepseek_v3")


def convert(model: Path, out: Path, target: TargetFormat, **options: Any) -> Converted:
    values = {"group": 32, "ignore": "lm_head" if target != "lossless" else ""}
    made = Conversion(model, out, target, **{**values, **options})
    return made.run(lambda done, total: None)


@pytest.fixture(scope="module")
def original_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a checkpoint of `quantised.CONFIGS`, once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = original(tmp_path_factory.mktemp(name), name)
        return made[name]

    return make


def loaded(folder: Path, dtype: str) -> tuple[Tensors, set[type]]:
    """All tensors that the recipes make, in parts as small as can be, and the kinds of
    their codecs."""
    checkpoint = open_checkpoint(folder)
    skeleton = hf.build(checkpoint, dtype)
    recipes = list(skeleton.recipes.values())
    kinds = {type(part.codec) for recipe in recipes for part in recipe.slices}
    assert sum(r.stored_bytes for r in recipes) <= checkpoint.num_bytes
    with opened(checkpoint, recipes, bounce_bytes=4096) as rig:
        return {name: tensor.clone() for name, tensor in rig.load().items()}, kinds


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_that_transformers_dequantises(
    case: str, original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    name, target = CASES[case]
    convert(original_of(name), tmp_path, target)
    made, kinds = loaded(tmp_path, "auto")
    assert Scaled in kinds
    wanted = dequantised(tmp_path).state_dict()
    assert made.keys() == wanted.keys()
    for key, tensor in made.items():
        assert same_bits(tensor, wanted[key]), key


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("case", ["int4", "fp8 experts"])
def test_streamed_is_equal_to_resident(
    case: str, original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    name, target = CASES[case]
    convert(original_of(name), tmp_path, target)
    with penstock.load(tmp_path, POLICY) as model, torch.inference_mode():
        assert same_bits(model(IDS).logits, dequantised(tmp_path)(IDS).logits)
    assert verify(tmp_path, POLICY).is_equal


@needs_library
@pytest.mark.parametrize("case", CASES)
def test_the_library_reads_the_section(
    case: str, original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """And finds the format that it would write this scheme in."""
    library: Any = importlib.import_module("compressed_tensors.quantization")
    formats: Any = importlib.import_module("compressed_tensors.compressors.format")
    name, target = CASES[case]
    convert(original_of(name), tmp_path, target)
    section = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    scheme = library.QuantizationConfig.model_validate(section).config_groups["group_0"]
    scheme.format = None
    assert formats.infer_module_format(nn.Linear, scheme).value == section["format"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["int4", "int8", "fp8"])
def test_numbers_are_the_nearest_ones(
    case: str, original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    name, target = CASES[case]
    source = original_of(name)
    convert(source, tmp_path, target)
    stored = load_file(tmp_path / "model.safetensors")
    for key, weight in load_file(source / "model.safetensors").items():
        if f"{key}_scale" not in stored:
            assert same_bits(stored[key], weight)
            continue
        wide = weight.float()
        scales = stored[f"{key}_scale"].float()
        scales = scales.repeat_interleave(wide.shape[1] // scales.shape[1], 1)
        if target == "int4":
            words = stored[f"{key}_packed"][..., None] >> torch.arange(0, 32, 4)
            numbers = ((words & 15) - 8).flatten(1).float()
            assert stored[f"{key}_shape"].tolist() == list(weight.shape)
        else:
            numbers = stored[key].float()
        step = scales / 2
        if target == "fp8":
            step = scales * numbers.abs().clamp(min=2.0**-6) / 16
        error = (numbers * scales - wide).abs()
        most = {"int4": 7, "int8": 127, "fp8": 448}[target]
        is_cut = numbers == most
        assert bool(((error <= step * 1.01) | (is_cut & (error <= 1.2 * step))).all())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_weights_have_all_their_bits(
    name: str, dtype: str, original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    convert(original_of(name), tmp_path, "lossless")
    made, kinds = loaded(tmp_path, dtype)
    assert Lossless in kinds
    wanted, _ = loaded(original_of(name), dtype)
    assert made.keys() == wanted.keys()
    for key, tensor in made.items():
        assert same_bits(tensor, wanted[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_lossless_model_computes_the_same(
    name: str, original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    made = convert(original_of(name), tmp_path, "lossless")
    assert made.bytes_after < made.bytes_before
    results = []
    for folder in (original_of(name), tmp_path):
        with penstock.load(folder, POLICY) as model, torch.inference_mode():
            assert not hasattr(model.config, "quantization_config")
            results.append(model(IDS).logits)
    assert same_bits(*results)
    assert verify(tmp_path, POLICY).is_equal


@pytest.mark.slow
@pytest.mark.parametrize("tier", [{"host_memory": "1MiB"}, {"peer": {"cpu": "1MiB"}}])
def test_tiers_keep_packed_weights(
    tier: dict[str, Any], original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    convert(original_of("qwen3_moe"), tmp_path, "lossless")
    results = []
    for folder in (original_of("qwen3_moe"), tmp_path):
        policy = Policy(device_memory="160KiB", resident_below=1, **tier)
        with penstock.load(folder, policy) as model, torch.inference_mode():
            model(IDS)
            results.append(model(IDS).logits)
    assert same_bits(*results)


@pytest.mark.parametrize(
    ("ignore", "left"),
    [
        (r"layers\.0\.self_attn\.q_proj|lm_head", ("q_proj", "k_proj", "v_proj")),
        (r"layers\.0\.mlp\.experts\.2\.up_proj|lm_head", ("experts",)),
    ],
)
def test_what_is_run_as_one_is_left_as_one(
    ignore: str,
    left: tuple[str, ...],
    original_of: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    made = convert(original_of("qwen3_moe"), tmp_path, "int8", ignore=ignore)
    section = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert section["ignore"] == list(made.ignored)
    stored = set(load_file(tmp_path / "model.safetensors"))
    for name in stored:
        if name.endswith(("proj.weight", "lm_head.weight")):
            is_left = "lm_head" in name or (
                ".layers.0." in name and any(f".{part}." in name for part in left)
            )
            assert (f"{name}_scale" in stored) != is_left, name
            assert (name.removesuffix(".weight") in made.ignored) == is_left, name
    assert "model.layers.1.mlp.gate" in made.ignored  # a router, though no nn.Linear
    assert not any(re.search("norm|embed", name) for name in made.ignored)


def test_layers_whose_columns_are_no_multiple_of_the_group_are_named(
    original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    made = convert(original_of("llama"), tmp_path, "int4", group=128)
    assert made.num_converted == 2  # down_proj, 128 columns
    assert "model.layers.1.self_attn.q_proj" in made.ignored
    assert "model.layers.1.mlp.down_proj" not in made.ignored


def test_stacked_experts_are_left_and_named(
    original_of: Callable[[str], Path], tmp_path: Path
) -> None:
    made = convert(original_of("gpt_oss"), tmp_path, "int4")
    assert "model.layers.1.mlp.experts" in made.ignored
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["model.layers.1.mlp.experts.down_proj"].dtype == torch.bfloat16
