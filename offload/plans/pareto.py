"""Plots latency against throughput over what is in flight, as in figure 1 of
Efficiently Scaling Transformer Inference (arXiv 2211.05102)."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...io.errors import OutputError, UsageError
from .plan import Plan


def frontier(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (seconds, tokens/s) that no other beats in both, by seconds."""
    found: list[tuple[float, float]] = []
    for seconds, rate in sorted(points, key=lambda p: (p[0], -p[1])):
        if not found or rate > found[-1][1]:
            found.append((seconds, rate))
    return found


def points_of(plan: Plan) -> list[tuple[float, float, int]]:
    """(seconds of a pass, tokens a second, number in flight) of each policy that
    fits."""
    return [
        (
            choice.prediction.pass_seconds,
            choice.rate,
            plan.task.in_flight(choice.policy),
        )
        for choice in plan.planner.choices()
    ]


def check_plot(path: Path) -> None:
    """Raises UsageError where matplotlib is missing or `path` is neither PNG nor SVG,
    OutputError where its folder does not exist. Called before anything is planned."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise UsageError(f"{path}: give a name that ends in .png or .svg")
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {path.parent}")
    if find_spec("matplotlib") is None:
        raise UsageError("plotting needs matplotlib: pip install 'penstock[bench]'")


def plot_pareto(plan: Plan, path: Path) -> None:
    """Writes the plot to `path`; its suffix says the format. Raises what `check_plot`
    raises, and OutputError where the file cannot be written."""
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_yscale("log")
    _draw(axes, points_of(plan))
    chosen = plan.choice
    axes.plot(
        [chosen.prediction.pass_seconds],
        [chosen.rate],
        "D",
        color="C3",
        label="the plan",
    )
    task = plan.task
    gives = ", which gives each a token" if task.keeps_kv else ""
    axes.set_xlabel(f"seconds of a pass{gives}")
    axes.set_ylabel(task.rate_unit)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(loc="lower right", title=f"numbers: {task.unit_in_flight} in flight")
    axes.set_title(f"{plan.model.resolve().name} on {plan.machine.name}", fontsize=11)
    try:
        figure.savefig(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def _draw(axes: Any, points: list[tuple[float, float, int]]) -> None:
    """Draws all points, and a line through those that no other beats, with what each
    has in flight."""
    axes.scatter(
        [seconds for seconds, _, _ in points],
        [rate for _, rate, _ in points],
        s=14,
        color="C0",
        alpha=0.5,
        label="tried",
    )
    best = frontier((seconds, rate) for seconds, rate, _ in points)
    axes.plot(*zip(*best, strict=True), color="C1", label="none is better in both")
    labels = {(seconds, rate): count for seconds, rate, count in points}
    for point in best:
        axes.annotate(
            f"{labels[point]:,}",
            point,
            xytext=(-4, 5),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
