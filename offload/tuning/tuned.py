"""The policy that a search ended with, as YAML. Comments have the measured and
predicted figures."""

from collections.abc import Sequence
from statistics import median

import yaml

from ...io.errors import PenstockError
from .race import (
    START,
    Final,
    Settings,
    Timing,
    Verdict,
    failures,
    name_of,
    rates_by_candidate,
)
from .slices import predicted_rate
from .tune import Tuning


def tuned_yaml(tuning: Tuning, verdict: Verdict, timings: Sequence[Timing]) -> str:
    """The YAML file of the policy that won, with comments, as `--policy` takes it."""
    winner = verdict.winner
    choice = tuning.choice(winner.settings if winner else START)
    lines = [*_head(tuning, verdict), *_table(tuning, timings)]
    lines += [
        f"out of the race: {name_of(settings)}: {_one_line(error)}"
        for settings, error in failures(timings).items()
    ]
    values = choice.policy.model_dump(mode="json", exclude_unset=True)
    comments = "".join(f"# {line}".rstrip() + "\n" for line in lines)
    return comments + yaml.safe_dump(values, sort_keys=False)


def verdict_line(verdict: Verdict) -> str:
    """The result of a search in one sentence."""
    winner = verdict.winner
    if winner is not None:
        return f"{name_of(winner.settings)} {_gain(winner)}"
    if not verdict.finals:
        return "nothing was found that could run beside the plan: it stays"
    best = verdict.finals[0]
    return f"the plan stays as it was: the best other, {_lost(best)}"


def _lost(best: Final) -> str:
    if best.gain <= 0:
        return f"{name_of(best.settings)}, was {-best.gain:.1%} slower"
    return (
        f"{name_of(best.settings)}, was {best.gain:.1%} faster, but not in each "
        f"lap, or not by more than they differ (+-{best.spread:.1%})"
    )


def _gain(winner: Final) -> str:
    return f"is {winner.gain:.1%} faster than the plan (laps: +-{winner.spread:.1%})"


def _head(tuning: Tuning, verdict: Verdict) -> list[str]:
    plan, winner = tuning.plan, verdict.winner
    work = tuning.slice_of(2)
    length = sum(work.lengths) / len(work.lengths)
    task = work.task
    rate = winner.rate if winner else verdict.start_rate
    predicted = predicted_rate(
        tuning.choice(winner.settings if winner else START), work
    )
    each = f" that get {task.new_tokens} more" if task.new_tokens else ""
    rows = "made-up rows" if tuning.sample.is_made_up else "rows of the input"
    return [
        f"{plan.model} on {plan.machine.name}, tuned to {task.name}",
        f"measured: {rate:,.1f} {task.rate_unit}{_predicted(predicted)} (median of "
        f"{verdict.num_laps})",
        f"verdict: {verdict_line(verdict)}",
        f"slices: up to {len(work.rows):,} {rows} of {length:,.0f} tokens{each}",
    ]


def _table(tuning: Tuning, timings: Sequence[Timing]) -> list[str]:
    """Comment lines with all settings that ran, the fastest of the longest slices
    first."""
    rungs = {t.settings: t.rung for t in timings if t.rate is not None}
    rates = rates_by_candidate(timings)
    order = sorted(rates, key=lambda s: (-_last_rung(s, timings), -median(rates[s])))
    found = ["", "tokens/s as measured (times), in the last rung of each:"]
    for settings in order:
        if settings in rungs:
            predicted = _predicted(_prediction(tuning, settings))
            found.append(
                f"  {median(rates[settings]):10,.1f} ({len(rates[settings])}x, rung "
                f"{_last_rung(settings, timings) + 1}{predicted})  {name_of(settings)}"
            )
    return found


def _last_rung(settings: Settings, timings: Sequence[Timing]) -> int:
    ran = [t.rung for t in timings if t.settings == settings and t.rate is not None]
    return max(ran)


def _prediction(tuning: Tuning, settings: Settings) -> float | None:
    try:
        choice = tuning.choice(settings)
    except PenstockError:
        return None
    return predicted_rate(choice, tuning.slice_of(1))


def _predicted(rate: float | None) -> str:
    return "" if rate is None else f", predicted {rate:,.1f}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
