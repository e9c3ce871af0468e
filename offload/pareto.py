"""Plots latency against throughput over what is in flight, as in figure 1 of
Efficiently Scaling Transformer Inference (arXiv 2211.05102)."""

from collections.abc import Iterable
from pathlib import Path

from ..io.errors import OutputError, UsageError
from .plan import Plan


def frontier(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (seconds, tokens/s), those that none is better than in both; by seconds."""
    found: list[tuple[float, float]] = []
    for seconds, rate in sorted(points, key=lambda p: (p[0], -p[1])):
        if not found or rate > found[-1][1]:
            found.append((seconds, rate))
    return found


def points_of(plan: Plan) -> list[tuple[float, float, int]]:
    """(seconds of a pass, tokens a second, in flight) of all that fits."""
    asked = "sequences_in_flight" if plan.task.generates else "tokens_in_flight"
    return [
        (
            choice.prediction.pass_seconds,
            choice.rate,
            int(getattr(choice.policy, asked)),
        )
        for choice in plan.planner.choices()
    ]


def plot_pareto(plan: Plan, path: Path) -> None:
    """Writes the plot to `path`, whose ending says what it is. Raises UsageError
    without matplotlib or for another kind of file, OutputError where it cannot."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise UsageError(f"{path}: give a name that ends in .png or .svg")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError(
            "plotting needs matplotlib: pip install 'penstock[bench]'"
        ) from None
    points = points_of(plan)
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.scatter([p[0] for p in points], [p[1] for p in points], s=14, alpha=0.5)
    best = frontier((seconds, rate) for seconds, rate, _ in points)
    axes.plot([p[0] for p in best], [p[1] for p in best], color="C1")
    labels = {(seconds, rate): count for seconds, rate, count in points}
    for point in best:
        axes.annotate(f"{labels[point]:,}", point, fontsize=7)
    what = "sequences" if plan.task.generates else "tokens"
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("seconds of a pass" + (" (a token)" if what != "tokens" else ""))
    axes.set_ylabel("output tokens/s" if plan.task.generates else "tokens/s")
    axes.set_title(f"{plan.model.name} on {plan.machine.name}: {what} in flight")
    try:
        figure.savefig(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
