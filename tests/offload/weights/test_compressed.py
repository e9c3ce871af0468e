"""What compressed-tensors writes is what transformers makes of it, dequantised."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_loader import opened
from transformers import AutoModelForCausalLM

import penstock
from checkpoints import same_bits
from penstock import Policy
from penstock.io.checkpoint.index import SINGLE_FILE, open_checkpoint
from penstock.io.codecs.scaled import Scaled
from penstock.io.errors import CheckpointError, PenstockError, UsageError
from penstock.offload.configs import quantizer
from penstock.offload.verify import verify
from penstock.offload.weights import hf
from quantised import Tensors, compressed, dequantised, original

HAS_LIBRARY = importlib.util.find_spec("compressed_tensors") is not None
needs_library = pytest.mark.skipif(
    not HAS_LIBRARY,
    reason='needs compressed-tensors: pip install "penstock[quantised]"',
)
pytestmark = pytest.mark.usefixtures("no_leaks")

POLICY = Policy(device_memory="1MiB", resident_below=1)
IDS = torch.arange(14).view(2, 7) + 3
CASES = {
    "W4A16": ("llama", "int4"),
    "W4A16_ASYM": ("llama", "int4"),
    "W8A8": ("llama", "int8"),
    "FP8": ("llama", "float8_e4m3fn"),
    "FP8_DYNAMIC": ("llama", "float8_e4m3fn"),
    "FP8_BLOCK": ("llama", "float8_e4m3fn"),
    "NVFP4A16": ("llama", "float4_e2m1"),
    "MXFP4A16": ("llama", "float4_e2m1"),
    "W4A16 experts": ("qwen3_moe", "int4"),
    "FP8_DYNAMIC experts": ("qwen3_moe", "float8_e4m3fn"),
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the checkpoint of a case, once."""
    made: dict[str, Path] = {}

    def make(case: str) -> Path:
        if case not in made:
            model, _ = CASES[case]
            if model not in made:
                made[model] = original(tmp_path_factory.mktemp(model), model)
            folder = tmp_path_factory.mktemp("compressed")
            made[case] = compressed(made[model], folder, case.split()[0])
        return made[case]

    return make


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_that_transformers_dequantises(
    case: str, folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of(case)
    checkpoint = open_checkpoint(folder)
    skeleton = hf.build(checkpoint, "auto")
    codecs = {p.codec for r in skeleton.recipes.values() for p in r.slices}
    kinds = {c.codes.value for c in codecs if isinstance(c, Scaled)}
    assert kinds == {CASES[case][1]}
    wanted = dequantised(folder).state_dict()
    assert skeleton.recipes.keys() == wanted.keys()
    with opened(checkpoint, list(skeleton.recipes.values()), bounce_bytes=4096) as rig:
        for name, tensor in rig.load().items():
            assert same_bits(tensor, wanted[name]), name


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("where", ["hf_quant_config.json", "config.json"])
@pytest.mark.parametrize("algorithm", ["NVFP4", "FP8"])
def test_model_optimizer_is_read_as_the_librarys_converter_reads_it(
    algorithm: str, where: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source = folder_of("NVFP4A16" if algorithm == "NVFP4" else "FP8")
    named: Tensors = {}
    for name, tensor in load_file(source / SINGLE_FILE).items():
        module, _, part = name.rpartition(".")
        if part == "weight_packed":
            named[f"{module}.weight"] = tensor
        elif part == "weight_global_scale":
            named[f"{module}.weight_scale_2"] = (1 / tensor).view(())
        elif part == "weight_scale" and algorithm == "FP8":
            named[name] = tensor.float().view(()) if tensor.numel() == 1 else tensor
        elif not part.startswith("input"):
            named[name] = tensor
        if part == "weight_scale":
            named[f"{module}.input_scale"] = torch.tensor(1.0)
    optimised = tmp_path / "optimised"
    optimised.mkdir()
    save_file(named, optimised / SINGLE_FILE, {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    section = config.pop("quantization_config")
    said = {"quant_algo": algorithm, "exclude_modules": ["lm_head", "*.router*"]}
    if where == "config.json":
        config["quantization_config"] = {"quant_method": "modelopt", **said}
    else:
        text = json.dumps({"producer": {"name": "modelopt"}, "quantization": said})
        (optimised / where).write_text(text)
    (optimised / "config.json").write_text(json.dumps(config))
    # What the converter makes of them: transformers itself does not know the format.
    tensors = dict(named)
    if algorithm == "NVFP4":
        converters: Any = importlib.import_module(
            "compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4"
        )
        converter = converters.ModelOptNvfp4Converter(
            ignore=["lm_head"], targets=["re:.*proj$"]
        )
        tensors = converter.process(tensors)
        for name in list(tensors):
            if name.endswith("global_scale"):
                tensors[name] = tensors[name].view(1)
            if name.endswith("input_global_scale"):
                del tensors[name]
    else:
        tensors = {k: v for k, v in tensors.items() if not k.endswith("input_scale")}
    converted = tmp_path / "converted"
    converted.mkdir()
    save_file(tensors, converted / SINGLE_FILE, {"format": "pt"})
    config["quantization_config"] = section
    (converted / "config.json").write_text(json.dumps(config))
    wanted = dequantised(converted).state_dict()
    checkpoint = open_checkpoint(optimised)
    skeleton = hf.build(checkpoint, "auto")
    assert not skeleton.notes
    with opened(checkpoint, list(skeleton.recipes.values()), bounce_bytes=4096) as rig:
        made = rig.load()
        assert made.keys() == wanted.keys()
        for name, tensor in made.items():
            assert same_bits(tensor, wanted[name]), name


@needs_library
def test_other_formats_of_model_optimizer_are_refused_by_name(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of("FP8")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "W4A8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / SINGLE_FILE).symlink_to(folder / SINGLE_FILE)
    with pytest.raises(UsageError, match=r"Model Optimizer \(W4A8\).*NVFP4 and FP8"):
        penstock.load(tmp_path, POLICY)


@needs_library
@pytest.mark.parametrize("algorithm", [["NVFP4"], 4, "x" * 10_000])
def test_odd_values_of_model_optimizer_are_one_sentence(
    algorithm: Any, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of("FP8")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "exclude_modules": 5,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / SINGLE_FILE).symlink_to(folder / SINGLE_FILE)
    with pytest.raises(UsageError, match=r"Model Optimizer.*NVFP4 and FP8") as refused:
        penstock.load(tmp_path, POLICY)
    assert len(str(refused.value)) < 1_000


@pytest.mark.parametrize("where", ["hf_quant_config.json", "config.json"])
def test_plain_weights_beside_quantised_keys_and_values_are_read(
    where: str, tmp_path: Path
) -> None:
    folder = original(tmp_path, "llama")
    said = {"quant_algo": None, "kv_cache_quant_algo": "FP8", "exclude_modules": [1]}
    if where == "config.json":
        config = json.loads((folder / where).read_text())
        config["quantization_config"] = {"quant_method": "modelopt", **said}
        (folder / where).write_text(json.dumps(config))
    else:
        (folder / where).write_text(json.dumps({"quantization": said}))
    skeleton = hf.build(open_checkpoint(folder), "auto")
    assert not skeleton.notes


@needs_library
def test_two_tensors_for_one_weight_are_refused(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of("NVFP4A16")
    tensors = load_file(folder / SINGLE_FILE)
    name = next(name for name in tensors if name.endswith("weight_packed"))
    tensors[name.replace("weight_packed", "weight")] = tensors[name].clone()
    save_file(tensors, tmp_path / SINGLE_FILE, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="both there, for one weight"):
        penstock.load(tmp_path, POLICY)


@needs_library
def test_a_global_scale_without_dimensions_divides(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """What it means is not guessed from its shape."""
    folder = folder_of("NVFP4A16")
    tensors = {
        name: tensor.view(()) if name.endswith("global_scale") else tensor
        for name, tensor in load_file(folder / SINGLE_FILE).items()
    }
    save_file(tensors, tmp_path / SINGLE_FILE, {"format": "pt"})
    (tmp_path / "config.json").symlink_to(folder / "config.json")
    wanted = dequantised(folder)
    with penstock.load(tmp_path, POLICY) as model, torch.inference_mode():
        assert same_bits(model(IDS).logits, wanted(IDS).logits)


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["W4A16_ASYM", "W8A8", "NVFP4A16", "FP8_DYNAMIC experts"]
)
def test_streamed_is_equal_to_resident(
    case: str, folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of(case)
    with penstock.load(folder, POLICY) as model, torch.inference_mode():
        assert same_bits(model(IDS).logits, dequantised(folder)(IDS).logits)
        assert not penstock.statistics(model).fallbacks
    assert verify(folder, POLICY).is_equal


NAME = "model.layers.1.mlp.up_proj.weight"


def without_zeros(tensors: Tensors) -> None:
    del tensors[f"{NAME}_zero_point"]


def with_few_zeros(tensors: Tensors) -> None:
    tensors[f"{NAME}_zero_point"] = tensors[f"{NAME}_zero_point"][:3].clone()


def without_scales(tensors: Tensors) -> None:
    del tensors[f"{NAME}_scale"]


def with_few_scales(tensors: Tensors) -> None:
    tensors[f"{NAME}_scale"] = tensors[f"{NAME}_scale"][:3].clone()


def with_short_rows(tensors: Tensors) -> None:
    tensors[f"{NAME}_packed"] = tensors[f"{NAME}_packed"][:, :4].clone()


def with_other_numbers(tensors: Tensors) -> None:
    tensors[f"{NAME}_packed"] = tensors[f"{NAME}_packed"].to(torch.int64)


def without_numbers(tensors: Tensors) -> None:
    del tensors[f"{NAME}_packed"]


def with_both_numbers(tensors: Tensors) -> None:
    tensors[NAME] = torch.zeros(128, 64, dtype=torch.bfloat16)


BAD: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "no_zeros": (without_zeros, "has no weight_zero_point beside it"),
    "few_zeros": (with_few_zeros, r"has shape \[3, 4\], which is not that"),
    "no_scales": (without_scales, "the files have no scales for it"),
    "few_scales": (with_few_scales, r"has shape \[3, 4\], which is not that"),
    "short_rows": (with_short_rows, r"holds a weight of \[128, 32\], but"),
    "other_numbers": (with_other_numbers, "is kept as torch.int64, which the format"),
    "both_numbers": (with_both_numbers, "are both there, for one weight"),
    "no_numbers": (without_numbers, "but not the weight_packed or weight beside it"),
}


@needs_library
@pytest.mark.parametrize("groups", [None, {}, [], 0, "x" * 10_000])
def test_a_section_without_groups_is_one_sentence(
    groups: Any, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of("W4A16")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"] = groups
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / SINGLE_FILE).symlink_to(folder / SINGLE_FILE)
    with pytest.raises(
        UsageError, match=r"config_groups is .*take a release"
    ) as refused:
        penstock.load(tmp_path, POLICY)
    assert len(str(refused.value)) < 1_000


@needs_library
@pytest.mark.parametrize("bad", BAD)
def test_what_does_not_go_together_is_one_sentence(
    bad: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of("W4A16_ASYM")
    change, words = BAD[bad]
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)
    save_file(tensors, tmp_path / SINGLE_FILE, {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=words) as refused:
        penstock.load(tmp_path, POLICY)
    assert NAME in str(refused.value)
    assert "\n" not in str(refused.value)


@needs_library
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_bits": 3}, "the format pack-quantized, 3 bits"),
        ({"actorder": "group"}, "actorder.*group"),
        ({"group_size": "16"}, "group_size is '16', and must be a whole number: downl"),
        ({"group_size": [16]}, r"group_size is \[16\], and must be a whole number"),
        ({"num_bits": 4.5}, r"num_bits is 4\.5, and must be a whole number"),
        ({"zzz": 1}, r"quantization_config: config_groups\.group_0\.weights\.zzz is 1"),
    ],
)
def test_other_formats_are_refused_by_name(
    change: dict[str, object],
    words: str,
    folder_of: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    folder = folder_of("W4A16")
    config = json.loads((folder / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_0"]["weights"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / SINGLE_FILE).symlink_to(folder / SINGLE_FILE)
    with pytest.raises(PenstockError, match=words):
        penstock.load(tmp_path, POLICY)


@needs_library
@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("W4A16", {"group_size": 32}),
        ("W4A16", {"group_size": 8}),
        ("W4A16", {"group_size": 2**40}),
        ("W4A16", {"strategy": "channel", "group_size": None}),
        ("NVFP4A16", {"group_size": 32}),
        ("FP8_BLOCK", {"block_structure": [32, 16]}),
    ],
)
def test_scales_of_other_groups_than_the_config_says_are_refused(
    case: str,
    change: dict[str, object],
    folder_of: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """The library refuses them, too: which of the two is right cannot be known."""
    folder = folder_of(case)
    config = json.loads((folder / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_0"]["weights"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / SINGLE_FILE).symlink_to(folder / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=r"weight_scale.*which is not that of"):
        penstock.load(tmp_path, POLICY)


@needs_library
@pytest.mark.parametrize("case", ["W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK"])
def test_scales_of_half_of_the_rows_are_refused(
    case: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of(case)
    tensors = load_file(folder / SINGLE_FILE)
    tensors[f"{NAME}_scale"] = tensors[f"{NAME}_scale"][::2].clone()
    save_file(tensors, tmp_path / SINGLE_FILE, {"format": "pt"})
    (tmp_path / "config.json").symlink_to(folder / "config.json")
    with pytest.raises(CheckpointError, match="which is not that of") as refused:
        penstock.load(tmp_path, POLICY)
    assert NAME in str(refused.value)


@needs_library
@pytest.mark.parametrize(
    ("case", "other"),
    [("W8A8", "FP8_BLOCK"), ("FP8_DYNAMIC", "W4A16"), ("FP8_DYNAMIC", "W8A8")],
)
def test_numbers_of_another_format_than_the_config_says_are_refused(
    case: str, other: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "config.json").symlink_to(folder_of(other) / "config.json")
    (tmp_path / SINGLE_FILE).symlink_to(folder_of(case) / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=r"is kept as .* does not have"):
        penstock.load(tmp_path, POLICY)


@needs_library
def test_a_model_that_decompresses_itself_is_not_wrapped(
    folder_of: Callable[[str], Path],
) -> None:
    kind: Any = AutoModelForCausalLM
    model = kind.from_pretrained(folder_of("W4A16"))
    with pytest.raises(UsageError, match=r"penstock\.load\(folder\) streams them"):
        penstock.wrap(model)
    wrapped: Any = penstock.wrap(dequantised(folder_of("W4A16")))
    with torch.inference_mode():
        assert wrapped(IDS).logits.isfinite().all()
    penstock.unwrap(wrapped)


def test_without_the_library_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = original(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(quantizer, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'pip install "penstock\[quantised\]"'):
        penstock.load(folder, POLICY)


@needs_library
@pytest.mark.parametrize(
    "case",
    [name for name in CASES if name != "FP8"],  # here, its files have a scale a row
)
def test_a_config_alone_says_how_many_bytes_are_stored(
    case: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of(case)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    wanted, found = (
        {name: (r.shape, r.stored_bytes) for name, r in made.recipes.items()}
        for made in (
            hf.build(open_checkpoint(folder), "auto"),
            hf.imagine(tmp_path, "auto"),
        )
    )
    assert found == wanted
