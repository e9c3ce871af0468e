"""Errors of weights: known differences have known errors, and equal bits are equal."""

from __future__ import annotations

import math

import pytest
import torch

from checkpoints import random_tensor
from penstock.offload.quality import weight_errors
from penstock.offload.quality.weight_errors import (
    added,
    unit_of,
    weight_error,
    worst_of,
)


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("model.layers.3.mlp.experts.5.up_proj.weight", "model.layers.3"),
        ("transformer.h.11.ln_1.bias", "transformer.h.11"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("lm_head.weight", "lm_head"),
        ("scale", "scale"),
    ],
)
def test_a_tensor_belongs_to_its_block_or_to_its_module(name: str, unit: str) -> None:
    assert unit_of(name) == unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_known_difference_has_the_known_error(dtype: torch.dtype) -> None:
    original = torch.tensor([[3.0, 0.0], [0.0, -4.0]], dtype=dtype)
    changed = torch.tensor([[3.0, 0.5], [0.0, -4.0]], dtype=dtype)
    error = weight_error("w", changed, original)
    assert not error.is_identical
    assert error.relative == 0.1
    assert error.largest == 0.5
    assert error.num_weights == 4


def test_tensors_that_are_longer_than_a_chunk_are_summed_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = torch.randn(7, 11)
    changed = original + 0.1 * torch.randn(7, 11)
    whole = weight_error("w", changed, original)
    monkeypatch.setattr(weight_errors, "_CHUNK_NUMEL", 10)
    parts = weight_error("w", changed, original)
    assert parts.relative == pytest.approx(whole.relative)
    norm = (changed.double() - original.double()).norm() / original.double().norm()
    assert parts.relative == pytest.approx(float(norm))
    assert parts.largest == whole.largest


def test_equal_bits_are_identical_whatever_they_are() -> None:
    tensor = random_tensor(torch.bfloat16, (64, 64))  # NaNs and infinities among them
    error = weight_error("w", tensor, tensor.clone())
    assert error.is_identical
    assert (error.relative, error.largest) == (0.0, 0.0)


def test_zeros_of_another_sign_are_no_difference_but_not_identical() -> None:
    error = weight_error("w", torch.tensor([-0.0, 1.0]), torch.tensor([0.0, 1.0]))
    assert not error.is_identical
    assert error.relative == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_has_no_relative_error(value: float) -> None:
    error = weight_error("w", torch.tensor([value, 1.0]), torch.ones(2))
    assert error.relative is None
    assert not math.isfinite(error.largest)
    assert weight_error("w", torch.ones(2), torch.zeros(2)).relative is None


def test_errors_add_up_to_that_of_one_tensor_of_all() -> None:
    one, other, third = (torch.randn(30) for _ in range(3))
    changed = [one + 1e-3, other * 1.5, third]
    pairs = zip(changed, (one, other, third), strict=True)
    errors = [weight_error(f"{i}", *pair) for i, pair in enumerate(pairs)]
    whole = weight_error("all", torch.cat(changed), torch.cat([one, other, third]))
    total = added("all", errors)
    assert total.relative == pytest.approx(whole.relative)
    assert total.largest == whole.largest
    assert total.num_weights == 90
    assert worst_of(errors) is errors[1]
    assert worst_of(errors[2:]) is None
