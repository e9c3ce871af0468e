"""Experts that are loaded one by one give the CPU's bits on the simulated GPU: from
each tier, as each kind of codec stores them."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import checkpoint
from transformers import AutoModelForCausalLM

import penstock
from on_device import GPU, TIERS
from penstock import Policy
from penstock.io.errors import DoesNotFitError
from penstock.offload.convert.conversion import Conversion
from penstock.offload.convert.schemes import TargetFormat
from penstock.offload.model import engine_of
from quantised import (
    dequantised,
    fp4_of,
    fp8_of,
    fp8_section,
    original,
    quantised,
)
from shares import shared
from sim_device import SimGpu

HAS_LIBRARY = importlib.util.find_spec("compressed_tensors") is not None
OF_LIBRARY = {"int8", "int4"}
pytest.importorskip("accelerate", reason="transformers dequantises only with it")
pytestmark = [pytest.mark.simgpu, pytest.mark.slow]

IDS = torch.arange(14).view(2, 7) + 3
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
Tensors = dict[str, torch.Tensor]


def resident(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").train(False)


def plain(name: str, folder: Path) -> tuple[Path, Any]:
    made = original(folder / name, name)
    return made, resident(made)


def llama4(folder: Path) -> tuple[Path, Any]:
    made = checkpoint(folder, "llama4", torch.bfloat16)
    return made, resident(made)


def fp8(folder: Path) -> tuple[Path, Any]:
    def change(name: str, weight: torch.Tensor) -> Tensors:
        numbers, scales = fp8_of(weight, (32, 16))
        return {name: numbers, name + "_scale_inv": scales}

    source = original(folder / "original", "deepseek_v3")
    made = quantised(source, folder / "fp8", change, fp8_section((32, 16)))
    return made, dequantised(made)


def mxfp4(folder: Path) -> tuple[Path, Any]:
    def change(name: str, weight: torch.Tensor) -> Tensors:
        if ".experts." not in name:
            return {name: weight}
        numbers, exponents = fp4_of(weight.transpose(1, 2))
        return {f"{name}_blocks": numbers, f"{name}_scales": exponents}

    source = original(folder / "original", "gpt_oss")
    made = quantised(source, folder / "mxfp4", change, {"quant_method": "mxfp4"})
    return made, dequantised(made)


def converted(target: TargetFormat, folder: Path) -> tuple[Path, Any]:
    """By `penstock convert`. The reference is the same on the CPU, where all fits."""
    source, made = original(folder / "original", "qwen3_moe"), folder / target
    ignored = "" if target == "lossless" else "lm_head"
    Conversion(source, made, target, group=32, ignore=ignored).run(lambda a, b: None)
    if target == "lossless":
        return made, resident(source)
    return made, penstock.load(made, Policy(device="cpu"))


KINDS: dict[str, Callable[[Path], tuple[Path, Any]]] = {
    "qwen3_moe": lambda folder: plain("qwen3_moe", folder),
    "gpt_oss": lambda folder: plain("gpt_oss", folder),
    "llama4": llama4,
    "fp8": fp8,
    "mxfp4": mxfp4,
    "int8": lambda folder: converted("int8", folder),
    "int4": lambda folder: converted("int4", folder),
    "lossless": lambda folder: converted("lossless", folder),
}
PLACES = tuple(TIERS)


def kept(place: int, case: tuple[str, str]) -> bool:
    """One of each kind's tiers, in turns."""
    kind, tier = place // len(PLACES), place % len(PLACES)
    return tier == kind % len(PLACES) and case[0] in ("fp8", "mxfp4", "llama4")


CASES = shared(list(product(KINDS, PLACES)), kept)
CASES = [
    pytest.param(
        *case.values,
        marks=[
            *case.marks,
            pytest.mark.skipif(
                case.values[0] in OF_LIBRARY and not HAS_LIBRARY,
                reason='needs compressed-tensors: pip install "penstock[quantised]"',
            ),
        ],
    )
    for case in CASES
]


@pytest.mark.parametrize(("kind", "tier"), CASES)
def test_experts_give_the_cpus_bits_from_each_tier(
    simgpu: SimGpu, tmp_path: Path, kind: str, tier: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of those who dequantise
        folder, whole = KINDS[kind](tmp_path)
    with torch.inference_mode():
        wanted = whole(IDS).logits
    tokens = whole.generate(IDS, **GREEDY)
    with in_the_least(folder, TIERS[tier]) as model:
        assert engine_of(model).model_division.stacks, "experts are cut"
        inputs = IDS.to(GPU)
        for seed in range(4):
            simgpu.schedule(seed)
            with torch.inference_mode():
                assert torch.equal(model(inputs).logits.cpu(), wanted)
        with penstock.sweep(model, coalesce=False) as sweep:
            made = sweep.map(lambda ids: model.generate(ids, **GREEDY), [inputs] * 2)
        assert all(ids.tolist() == tokens.tolist() for ids in made)
        assert not penstock.statistics(model).faults
    if kind in OF_LIBRARY:
        penstock.unwrap(whole)


def in_the_least(folder: Path, tier: dict[str, Any]) -> Any:
    """The checkpoint in the least memory of the device that its refusal names."""
    values = {"resident_below": 1, "gather_rows": 1000, **tier}
    if "placement" in values:  # there is no room for a unit that stays
        rules = {k: v for k, v in values["placement"].items() if v != "device"}
        values["placement"] = rules
    with pytest.raises(DoesNotFitError) as refused:
        penstock.load(folder, Policy(device=GPU, device_memory=4096, **values))
    least = int(str(refused.value).split()[-1])
    return penstock.load(folder, Policy(device=GPU, device_memory=least, **values))
