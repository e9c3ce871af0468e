"""A comparison as one web page that needs no network, and as JSON."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..reports.page import templates
from ..reports.report import write_text
from .comparison import Comparison
from .table import difference_words, percent, relative_words, worst_words


def write_figures(path: Path, figures: dict[str, Any]) -> None:
    """Writes the file of `figures`. Raises OutputError."""
    write_text(path, json.dumps(figures, indent=2, allow_nan=False) + "\n")


def write_quality(folder: Path, comparison: Comparison) -> None:
    """Writes quality.html and quality.json to `folder`, which is created if needed.
    Raises OutputError."""
    write_figures(folder / "quality.json", comparison.figures())
    write_text(folder / "quality.html", render_quality(comparison))


def render_quality(comparison: Comparison) -> str:
    """The whole page."""
    texts = comparison.texts
    low, high = decades([unit.total.relative for unit in comparison.units])
    return (
        templates()
        .get_template("quality.html.j2")
        .render(
            comparison=comparison,
            figures=comparison.figures(),
            error=relative_words(comparison.total),
            texts=texts,
            difference=None if texts is None else difference_words(texts),
            agreement=None if texts is None else f"{100 * texts.agreement:.2f} %",
            bars=[
                {
                    "name": unit.total.name,
                    "height": height(unit.total.relative, low, high),
                    "words": relative_words(unit.total),
                    "largest": f"{unit.total.largest:.2g}",
                    "worst": worst_words(unit),
                    "unit": unit,
                }
                for unit in comparison.units
            ],
            marks=[
                {"words": percent(10.0**power), "height": _place(power, low, high)}
                for power in range(low, high + 1)
            ],
        )
    )


def decades(errors: Sequence[float | None]) -> tuple[int, int]:
    """The powers of ten (low, high) between which all errors above zero are."""
    found = [math.log10(error) for error in errors if error]
    if not found:
        return -3, 0
    # An error of 1 % in float32 may be a little less.
    low, high = math.floor(min(found) + 1e-6), math.ceil(max(found) - 1e-6)
    return low, max(high, low + 1)


def height(error: float | None, low: int, high: int) -> float:
    """The height of the bar of `error` in per cent of the picture, whose scale is
    logarithmic from 10**low to 10**high: 0 for no error, 100 for one that is no
    number."""
    if error is None:
        return 100.0
    return (
        0.0
        if error == 0
        else min(100.0, max(1.0, _place(math.log10(error), low, high)))
    )


def _place(power: float, low: int, high: int) -> float:
    return 100 * (power - low) / (high - low)
