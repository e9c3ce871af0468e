"""The page of a comparison: what it says, its picture, and what it escapes."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest
import torch

from penstock.offload.quality.comparison import Comparison
from penstock.offload.quality.page import decades, height, render_quality
from penstock.offload.quality.text_quality import TextQuality
from penstock.offload.quality.token_scores import TokenScores
from penstock.offload.quality.weight_errors import UnitError, weight_error, worst_of

EVIL = "</style><script>alert(1)</script><img src=x onerror=alert(2)>&\"'"


def unit(name: str, factor: float) -> UnitError:
    original = torch.ones(8)
    error = weight_error(name, original * factor, original)
    worst = worst_of([error])
    return UnitError(error, worst, 1, error.is_identical, 8, 32)


def scores(*logprobs: float) -> TokenScores:
    found = torch.tensor(logprobs)
    return TokenScores(found, torch.arange(len(found), dtype=torch.int32), 7)


def texts(*pairs: tuple[TokenScores, TokenScores]) -> TextQuality:
    quality = TextQuality("float32")
    for one, other in pairs:
        quality.add(one, other)
    return quality


def comparison(quality: TextQuality | None, name: str = "model") -> Comparison:
    units = (unit("embed", 1.0), unit("layers.0", 1.01), unit("layers.1", 1.5))
    return Comparison(
        Path(name), Path("original"), "bfloat16", units, quality, (name,), 1.0
    )


def text_of(page: str) -> str:
    body = page.partition("</head>")[2]
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", body)).split())


def test_the_page_states_errors_and_perplexities() -> None:
    quality = texts((scores(-1.0, -3.0), scores(-1.0, -2.0)))
    said = text_of(render_quality(comparison(quality)))
    assert "7.3891, the original's 4.4817: +64.9 %" in said
    assert "100.00 % top-1 agreement" in said
    assert "1 of 3 tensors are identical" in said
    assert "layers.1 8 8 B 32 B 50 %" in said
    assert "embed 8 8 B 32 B identical" in said


def test_bars_are_in_the_order_of_the_model_on_a_scale_of_logarithms() -> None:
    page = render_quality(comparison(None))
    bars = re.findall(r'height:([\d.]+)%" title="([^"]*)"', page)
    assert bars == [
        ("0.00", "embed: identical"),
        ("1.00", "layers.0: 1 %"),
        ("84.95", "layers.1: 50 %"),
    ]
    assert "No texts were given" in page


def test_identical_models_are_said_to_be() -> None:
    quality = texts((scores(-1.0, -3.0), scores(-1.0, -3.0)))
    whole = Comparison(
        Path("a"), Path("b"), "float32", (unit("x", 1.0),), quality, (), 1.0
    )
    said = text_of(render_quality(whole))
    assert "Weights identical" in said
    assert "7.389 identical Every log-probability of both is equal" in said
    assert "To know" not in said


def test_no_name_becomes_markup() -> None:
    quality = TextQuality("float32")
    quality.fail(EVIL, EVIL)
    quality.add(scores(-1.0), scores(-2.0))
    page = render_quality(comparison(quality, EVIL))
    assert "<script" not in page
    assert "<img" not in page


@pytest.mark.parametrize(
    ("errors", "wanted"),
    [
        ([], (-3, 0)),
        ([0.0, None], (-3, 0)),
        ([0.02, 0.0, 0.4], (-2, 0)),
        ([0.01], (-2, -1)),
        ([3e-4, 12.0], (-4, 2)),
    ],
)
def test_the_scale_holds_all_errors(
    errors: list[float | None], wanted: tuple[int, int]
) -> None:
    low, high = decades(errors)
    assert (low, high) == wanted
    assert all(0 <= height(error, low, high) <= 100 for error in errors)


def test_sums_over_rows_are_those_over_all_tokens() -> None:
    one, other = torch.randn(2, 50).abs().neg()
    a = texts((scores(*one.tolist()), scores(*other.tolist())))
    halves = [(one[:20], other[:20]), (one[20:], other[20:])]
    b = texts(*((scores(*x.tolist()), scores(*y.tolist())) for x, y in halves))
    d = (one - other).double()
    for found in (a, b):
        ratio = float(torch.exp(-d.mean()))
        assert found.difference == pytest.approx(ratio - 1)
        assert found.perplexity / found.original_perplexity == pytest.approx(ratio)
        wanted = ratio * float(d.std()) / 50**0.5
        assert found.standard_error == pytest.approx(wanted)
    assert texts((scores(-1.0), scores(-2.0))).standard_error is None
