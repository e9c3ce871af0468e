"""Quantised checkpoints are what transformers makes of them with `dequantize=True`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_loader import opened

import penstock
from checkpoints import same_bits
from penstock import Policy
from penstock.io.checkpoint.index import SINGLE_FILE, open_checkpoint
from penstock.io.codecs.computed import Computed
from penstock.io.errors import CheckpointError, PenstockError
from penstock.offload.model import engine_of
from penstock.offload.verify import verify
from penstock.offload.weights import hf
from penstock.offload.weights.blueprint import blueprint
from quantised import (
    Tensors,
    dequantised,
    fp4_of,
    fp8_of,
    fp8_section,
    original,
    quantised,
)

pytest.importorskip("accelerate", reason="transformers dequantises FP8 only with it")
pytestmark = pytest.mark.usefixtures("no_leaks")

BLOCKS = (32, 16)
POLICY = Policy(device_memory="1MiB", resident_below=1)
IDS = torch.arange(14).view(2, 7) + 3
SCALE = "_scale_inv"


def blocks_of(name: str, weight: torch.Tensor) -> Tensors:
    numbers, scales = fp8_of(weight, BLOCKS)
    return {name: numbers, name + SCALE: scales}


def channels_of(name: str, weight: torch.Tensor) -> Tensors:
    numbers, scales = fp8_of(weight, (1, weight.shape[1]))
    return {name: numbers, name + SCALE: scales.bfloat16()}


def whole_of(name: str, weight: torch.Tensor) -> Tensors:
    numbers, scales = fp8_of(weight, weight.shape)
    return {name: numbers, name + SCALE: scales.view(())}


def exponents_of(name: str, weight: torch.Tensor) -> Tensors:
    """As DeepSeek-V4 has it: `.scale`, of one byte each."""
    numbers, scales = fp8_of(weight, BLOCKS, powers=True)
    key = f"{name.removesuffix('weight')}scale"
    return {name: numbers, key: scales.to(torch.float8_e8m0fnu)}


def bytes_of(name: str, weight: torch.Tensor) -> Tensors:
    """As MXFP8 has it: exponents as integers."""
    numbers, scales = fp8_of(weight, (1, 32), powers=True)
    return {
        name: numbers,
        name + SCALE: scales.to(torch.float8_e8m0fnu).view(torch.uint8),
    }


def some_of(name: str, weight: torch.Tensor) -> Tensors:
    """Only the experts."""
    return blocks_of(name, weight) if ".experts." in name else {name: weight}


def halves_of(name: str, weight: torch.Tensor) -> Tensors:
    """As DeepSeek-V4 has it: experts of 4-bit floats, 8-bit ones beside them."""
    if ".experts." not in name:
        return exponents_of(name, weight)
    numbers, exponents = fp4_of(weight)
    key = f"{name.removesuffix('weight')}scale"
    return {
        name: numbers.flatten(1).view(torch.int8),
        key: exponents.view(torch.float8_e8m0fnu),
    }


def stacked_of(name: str, weight: torch.Tensor) -> Tensors:
    """As gpt-oss has it: transposed, and only the experts."""
    if ".experts." not in name:
        return {name: weight}
    numbers, exponents = fp4_of(weight.transpose(1, 2))
    return {f"{name}_blocks": numbers, f"{name}_scales": exponents}


CASES: dict[str, tuple[str, Callable[[str, torch.Tensor], Tensors], Any]] = {
    "dense": ("llama", blocks_of, BLOCKS),
    "per_channel": ("llama", channels_of, None),
    "per_tensor": ("llama", whole_of, None),
    "other_names": ("llama", exponents_of, BLOCKS),
    "bytes": ("llama", bytes_of, (1, 32)),
    "moe": ("qwen3_moe", blocks_of, BLOCKS),
    "moe_per_channel": ("qwen3_moe", channels_of, None),
    "moe_in_part": ("qwen3_moe", some_of, BLOCKS),
    "deepseek": ("deepseek_v3", blocks_of, BLOCKS),
    "deepseek_v4": ("deepseek_v3", halves_of, BLOCKS),
    "gpt_oss": ("gpt_oss", stacked_of, "mxfp4"),
}


@pytest.fixture(scope="module")
def folder_of(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """Makes the checkpoint of a case, once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            model, change, blocks = CASES[name]
            if model not in made:
                made[model] = original(tmp_path_factory.mktemp(model), model)
            folder = tmp_path_factory.mktemp(name)
            section = fp8_section(blocks)
            if blocks == "mxfp4":
                section = {"quant_method": "mxfp4"}
            made[name] = quantised(made[model], folder, change, section)
        return made[name]

    return make


def loaded(folder: Path, dtype: str) -> Tensors:
    """All tensors that the recipes make, in parts as small as can be."""
    checkpoint = open_checkpoint(folder)
    skeleton = hf.build(checkpoint, dtype)
    codecs = [p.codec for r in skeleton.recipes.values() for p in r.slices]
    assert not any(isinstance(codec, Computed) for codec in codecs)
    nbytes = sum(entry.nbytes for entry in checkpoint.entries.values())
    assert sum(r.stored_bytes for r in skeleton.recipes.values()) == nbytes
    with opened(checkpoint, list(skeleton.recipes.values()), bounce_bytes=4096) as rig:
        return {name: tensor.clone() for name, tensor in rig.load().items()}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_that_transformers_dequantises(
    case: str, dtype: str, folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of(case)
    made = loaded(folder, dtype)
    wanted = dequantised(folder, dtype=dtype).state_dict()
    assert made.keys() == wanted.keys()
    for name, tensor in made.items():
        # transformers leaves unscaled weights in bfloat16, whatever is asked for
        assert same_bits(tensor, wanted[name].to(tensor.dtype)), name


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dense", "moe", "deepseek", "gpt_oss"])
def test_streamed_is_equal_to_resident(
    case: str, folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of(case)
    resident: Any = dequantised(folder)
    with penstock.load(folder, POLICY) as model, torch.inference_mode():
        assert not hasattr(model.config, "quantization_config")
        assert same_bits(model(IDS).logits, resident(IDS).logits)
        options = {"max_new_tokens": 4, "do_sample": False}
        wanted = resident.generate(IDS, **options)
        assert torch.equal(model.generate(IDS, **options), wanted)
    assert verify(folder, POLICY).is_equal


PIECES = [
    ("moe", {}),
    ("gpt_oss", {"weights_kept": "stored", "host_memory": "1MiB"}),
    ("deepseek", {"host_memory": "40KiB"}),
    ("deepseek_v4", {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "values"), PIECES)
def test_experts_that_are_loaded_one_by_one_are_equal(
    case: str, values: dict[str, Any], folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of(case)
    resident: Any = dequantised(folder)
    links = {"host": {"bandwidth": "4GiB"}}
    policy = Policy(device_memory="120KiB", resident_below=1, links=links, **values)
    with penstock.load(folder, policy) as model, torch.inference_mode():
        assert engine_of(model).model_division.stacks
        assert same_bits(model(IDS).logits, resident(IDS).logits)
        options = {"max_new_tokens": 4, "do_sample": False}
        wanted = resident.generate(IDS, **options)
        assert torch.equal(model.generate(IDS, **options), wanted)
    verified = verify(folder, policy)
    assert verified.is_equal
    assert not verified.faults


def test_it_is_announced_that_torch_decodes(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    folder = folder_of("dense")
    with penstock.load(folder, POLICY) as model, torch.inference_mode():
        slow = model(IDS).logits
        fallbacks = penstock.statistics(model).fallbacks
    (sentence,) = (each for each in fallbacks if "decoded by torch" in each)
    assert "there is no C compiler" in sentence
    monkeypatch.delenv("CC")
    with penstock.load(folder, POLICY) as model, torch.inference_mode():
        assert same_bits(model(IDS).logits, slow)


@pytest.mark.slow
def test_blocks_at_the_edges_are_as_large_as_the_config_says(tmp_path: Path) -> None:
    """transformers divides such weights evenly, or refuses them."""
    source = original(tmp_path / "original", "deepseek_v3")
    blocks = (48, 40)

    def change(name: str, weight: torch.Tensor) -> Tensors:
        numbers, scales = fp8_of(weight, blocks)
        return {name: numbers, name + SCALE: scales}

    folder = quantised(source, tmp_path / "it", change, fp8_section(blocks))
    made = loaded(folder, "float32")
    stored = load_file(folder / SINGLE_FILE)
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    rows, columns = stored[name].shape
    scales = stored[name + SCALE].repeat_interleave(blocks[0], 0)[:rows]
    scales = scales.repeat_interleave(blocks[1], 1)[:, :columns]
    assert rows % blocks[0]
    assert columns % blocks[1]
    assert same_bits(made[name], stored[name].float() * scales)


NAME = "model.layers.1.mlp.up_proj.weight"


def without_scales(tensors: Tensors) -> None:
    del tensors[NAME + SCALE]


def without_weight(tensors: Tensors) -> None:
    del tensors[NAME]


def with_few_scales(tensors: Tensors) -> None:
    tensors[NAME + SCALE] = tensors[NAME + SCALE][:3].clone()


def with_flat_scales(tensors: Tensors) -> None:
    tensors[NAME + SCALE] = tensors[NAME + SCALE].reshape(-1)


def with_both_scales(tensors: Tensors) -> None:
    tensors[NAME.removesuffix("weight") + "scale"] = tensors[NAME + SCALE].clone()


def with_integer_scales(tensors: Tensors) -> None:
    tensors[NAME + SCALE] = tensors[NAME + SCALE].to(torch.int32)


def with_integer_weight(tensors: Tensors) -> None:
    tensors[NAME] = tensors[NAME].to(torch.int32)


def with_narrow_weight(tensors: Tensors) -> None:
    tensors[NAME] = tensors[NAME][:, :32].clone()


BAD: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "no_scales": (without_scales, "the files have no scales for it"),
    "no_weight": (without_weight, "is there, but not the weight beside it"),
    "few_scales": (
        with_few_scales,
        r"has shape \[3, 4\], which is not that",
    ),
    "flat_scales": (
        with_flat_scales,
        r"has shape \[16\], which is not that",
    ),
    "both_scales": (with_both_scales, "are both there, for one weight"),
    "integer_scales": (with_integer_scales, "is kept as torch.int32, which scales"),
    "integer_weight": (with_integer_weight, "which is no 8-bit float"),
    "narrow_weight": (with_narrow_weight, r"holds a weight of \[128, 32\], but"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_does_not_go_together_is_one_sentence(
    bad: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of("dense")
    change, words = BAD[bad]
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)
    save_file(tensors, tmp_path / SINGLE_FILE, {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=words) as refused:
        penstock.load(tmp_path, POLICY)
    assert NAME in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("gone", "more", "words"),
    [
        ("2.up_proj", None, r"without '.*\.2\.up_proj\.weight', which the files lack"),
        ("3.down_proj", None, r"without '.*\.3\.down_proj\.weight', which the files"),
        (
            "up_proj",
            None,
            r"without mlp\.experts\.\*\.up_proj\.weight, which the files",
        ),
        (None, "2.up_proj", r"since '.*\.4\.up_proj\.weight' is there.*has 4 experts"),
    ],
)
def test_experts_that_are_missing_or_too_many_are_named(
    gone: str | None,
    more: str | None,
    words: str,
    folder_of: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    folder = folder_of("moe")
    tensors = load_file(folder / SINGLE_FILE)
    for name in list(tensors):
        if gone is not None and "layers.1.mlp.experts." in name and gone in name:
            del tensors[name]
        elif more is not None and f"layers.1.mlp.experts.{more}" in name:
            tensors[name.replace("experts.2.", "experts.4.")] = tensors[name].clone()
    save_file(tensors, tmp_path / SINGLE_FILE, {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=words):
        penstock.load(tmp_path, POLICY)


def test_stacked_experts_without_a_section_are_told_as_quantised(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of("gpt_oss")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / SINGLE_FILE).symlink_to(folder / SINGLE_FILE)
    with pytest.raises(
        CheckpointError, match=r"is quantised, since .*_(blocks|scales)'"
    ):
        penstock.load(tmp_path, POLICY)


@pytest.mark.parametrize("part", ["blocks", "scales"])
def test_stacked_experts_that_do_not_go_together(
    part: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of("gpt_oss")
    name = f"model.layers.0.mlp.experts.down_proj_{part}"
    for is_cut in (False, True):
        tensors = load_file(folder / SINGLE_FILE)
        found = tensors.pop(name)
        if is_cut:
            tensors[name] = found[:, :8]
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(tensors, tmp_path / SINGLE_FILE, {"format": "pt"})
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        with pytest.raises(CheckpointError, match=r"experts\.down_proj_"):
            penstock.load(tmp_path, POLICY)


def test_truncated_scales_are_refused(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of("dense")
    whole = (folder / SINGLE_FILE).read_bytes()
    (tmp_path / SINGLE_FILE).write_bytes(whole[:-8])
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="bytes"):
        penstock.load(tmp_path, POLICY)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"quant_method": "awq"}, r"is quantised \(awq\).*: take a release in FP8"),
        ({"bits": 4}, "is quantised .*'bits': 4.*: take a release in FP8"),
        ({"quant_method": "x" * 10_000}, r"is quantised \(x{100}\)"),
        ("fp8", "must be an object that says how.*not 'fp8': download"),
        ([fp8_section(BLOCKS)], "must be an object that says how.*not .*: download"),
        (
            {**fp8_section(BLOCKS), "activation_scheme": "odd"},
            "config.json, quantization_config: .*odd",
        ),
        (
            {**fp8_section(BLOCKS), "modules_to_convert": ["embed_tokens"]},
            "keeps embeddings quantised",
        ),
    ],
)
def test_other_sections_are_refused_by_name(
    section: Any,
    words: str,
    folder_of: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    folder = folder_of("dense")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = section
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / SINGLE_FILE).symlink_to(folder / SINGLE_FILE)
    with pytest.raises(PenstockError, match=words):
        penstock.load(tmp_path, POLICY)


@pytest.mark.parametrize("value", [128, "128", [1.5, 1.5], [[128], [128]], {}, True])
def test_blocks_that_are_no_numbers_are_one_sentence(
    value: Any, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of("dense")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / SINGLE_FILE).symlink_to(folder / SINGLE_FILE)
    words = r"weight_block_size is .*, and must be two whole numbers: download"
    with pytest.raises(CheckpointError, match=words):
        penstock.load(tmp_path, POLICY)


@pytest.mark.parametrize("case", ["dense", "per_tensor", "moe", "deepseek", "gpt_oss"])
def test_a_config_alone_says_how_many_bytes_are_stored_and_by_which_codecs(
    case: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of(case)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (there, has_weights), (imagined, has_none) = (
        blueprint(each, "auto") for each in (folder, tmp_path)
    )
    assert (has_weights, has_none) == (True, False)
    wanted, found = (
        {
            name: (r.shape, r.dtype, r.stored_bytes, {p.codec.name for p in r.slices})
            for name, r in made.recipes.items()
        }
        for made in (there, imagined)
    )
    assert found == wanted
