"""Keys and values in one byte an element: how much of them is lost, and that it is
said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import penstock
import zoo
from penstock import Policy
from penstock.io.codecs.tiles import TILES
from penstock.io.kv.codec import Quantised
from penstock.io.kv.shape import KvShape
from shares import in_turns

pytestmark = pytest.mark.usefixtures("no_leaks")

# The largest error, relative to the largest element of a group (int8) or to the element
# itself (fp8), plus that of rounding the scale and the result to 16 bits.
INT8 = 1 / 254 + 1 / 2048
FP8 = 1 / 16 + 1 / 2048


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dims", [(64, 64), (48, 20), (7, 5)])
def test_what_is_lost_is_bounded(
    kind: torch.dtype, dtype: torch.dtype, dims: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-2, 3, 6).view(1, 1, 6, 1)
    keys, values = (
        (torch.randn(3, 2, 6, dim, generator=generator) * scales).to(dtype)
        for dim in dims
    )
    shape = KvShape.of(keys, values)
    codec = Quantised(shape, kind, TILES)
    rows = codec.encode(keys, values)
    assert rows.shape == (6 * codec.row_bytes,)
    found = codec.decode(rows)
    slack = 0.0 if dtype == torch.float32 else 1 / 128
    for exact, got in zip((keys, values), found, strict=True):
        assert got.dtype == dtype
        error = (got.float() - exact.float()).abs()
        if kind == torch.int8:
            size = max(s for s in range(1, 33) if exact.shape[-1] % s == 0)
            groups = exact.float().abs().reshape(*exact.shape[:-1], -1, size)
            largest = groups.amax(-1, keepdim=True).expand_as(groups).flatten(-2)
            assert bool((error <= largest * (INT8 + slack)).all())
        else:
            largest = exact.float().abs().amax()
            allowed = exact.float().abs() * (FP8 + slack) + largest * 1e-4
            assert bool((error <= allowed).all())
        assert bool((error > 0).any())


def test_it_takes_half_of_the_bytes() -> None:
    shape = KvShape(4, 8, 128, 8, 128, torch.bfloat16)
    assert Quantised(shape, torch.int8, TILES).row_bytes == shape.row_bytes * 17 // 32


def test_nothing_is_kept_as_nothing() -> None:
    zeros = torch.zeros(1, 1, 2, 8)
    codec = Quantised(KvShape.of(zeros, zeros), torch.float8_e4m3fn, TILES)
    for found in codec.decode(codec.encode(zeros, zeros)):
        assert torch.equal(found, zeros)


@pytest.mark.parametrize(
    ("tier", "dtype"), in_turns(["auto", "host", "link", "disk"], ["int8", "fp8"])
)
def test_generating_with_it_is_close_and_said_to_be_lossy(
    dtype: str, tier: str, tmp_path: Path
) -> None:
    zoo.save_checkpoint("llama", tmp_path)
    items = [zoo.inputs("llama", seed=seed) for seed in range(3)]
    alone = zoo.load("llama", tmp_path)
    how: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False}
    how |= {"return_dict_in_generate": True, "output_logits": True}
    settings: dict[str, Any] = {"device_memory": "2MiB", "resident_below": 1}
    settings["io"] = {"cache": tmp_path / "cache"}
    if tier == "link":
        settings["links"] = {"host": {"bandwidth": "10GB"}}
    where = "host" if tier == "link" else tier
    policy = Policy(**settings, kv={"tier": where, "dtype": dtype})
    with penstock.load(tmp_path, policy) as model:
        with penstock.sweep(model) as sweep:
            found = sweep.map(
                lambda item: model.generate(**item, **how).logits[-1], items
            )
        statistics = penstock.statistics(model)
        assert [note for note in statistics.fallbacks if f"kept as {dtype}" in note]
        tiers = set(statistics.kv.bytes_written)
        assert tiers == {"device" if tier == "auto" else where}
        assert not any(statistics.kv.bytes_held.values())
    for one, item in zip(found, items, strict=True):
        exact = alone.generate(**item, **how).logits[-1]
        error = (one - exact).norm() / exact.norm()
        assert 0 < float(error) < (0.05 if dtype == "int8" else 0.2)
