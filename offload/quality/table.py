"""A comparison in words, and as a table for people."""

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ...io.errors import readable
from ..monitoring.show import human_bytes
from .comparison import Comparison
from .text_quality import TextQuality
from .weight_errors import UnitError, WeightError


def units_table(comparison: Comparison) -> Table:
    """A row for each unit, in the order of the model."""
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        caption="error: |model - original| / |original|, as norms",
    )
    table.add_column("unit", no_wrap=True)
    for name in ("stored", "original", "error", "largest"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("worst tensor", overflow="fold")
    for unit in comparison.units:
        table.add_row(*map(escape, _cells(unit)))
    return table


def _cells(unit: UnitError) -> tuple[str, ...]:
    total = unit.total
    return (
        readable(total.name),
        human_bytes(unit.stored_bytes),
        human_bytes(unit.original_bytes),
        relative_words(total),
        "" if total.is_identical else f"{total.largest:.2g}",
        worst_words(unit),
    )


def worst_words(unit: UnitError) -> str:
    """The name of the worst tensor within its unit, and its error."""
    if unit.worst is None:
        return ""
    name = unit.worst.name.removeprefix(f"{unit.total.name}.").removesuffix(".weight")
    return f"{readable(name)} {relative_words(unit.worst)}"


def relative_words(error: WeightError) -> str:
    """The relative error: "identical", "2.91 %", or "no number"."""
    if error.is_identical:
        return "identical"
    return "no number" if error.relative is None else percent(error.relative)


def percent(share: float) -> str:
    """0.02911 becomes "2.91 %"."""
    return f"{100 * share:.3g} %"


def summary(comparison: Comparison) -> Iterator[str]:
    """The comparison in a few lines."""
    total, num = comparison.total, comparison.num_tensors
    same = comparison.num_identical
    stored = (
        f"{human_bytes(comparison.stored_bytes)} stored, "
        f"{human_bytes(comparison.original_bytes)} the original"
    )
    if total.is_identical:
        yield f"weights: identical, all {num:,} tensors, bit for bit ({stored})"
    else:
        yield (
            f"weights: {num - same:,} of {num:,} tensors differ; relative error "
            f"{relative_words(total)}, largest difference {total.largest:.3g}, in "
            f"{comparison.dtype} ({stored})"
        )
    if comparison.texts is not None:
        yield from _texts(comparison.texts)


def _texts(texts: TextQuality) -> Iterator[str]:
    what = f"{texts.tokens:,} tokens of {texts.rows:,} rows, computed in {texts.dtype}"
    if texts.is_identical:
        yield (
            f"perplexity: {texts.perplexity:.4f} of both, identical: every "
            f"log-probability, bit for bit ({what})"
        )
    else:
        yield (
            f"perplexity: {texts.perplexity:.4f}, the original's "
            f"{texts.original_perplexity:.4f}: {difference_words(texts)} ({what})"
        )
    yield f"top-1 agreement: {100 * texts.agreement:.2f} % of next tokens"
    if texts.rows_failed:
        failed = f"{texts.rows_failed:,} of {texts.rows + texts.rows_failed:,} rows"
        why = readable(texts.first_error or "")
        yield f"left out: {failed} failed, the first: {why}"


def difference_words(texts: TextQuality) -> str:
    """The difference of perplexities: "+0.312 % (standard error 0.051 %)"."""
    error = texts.standard_error
    beside = "" if error is None else f" (standard error {percent(error)})"
    return f"{100 * texts.difference:+.3g} %{beside}"
