"""Makes the report as one web page that needs no network.

The template is filled in with autoescaping. The data of the scripts is JSON without
`<`. So no name of a model or a row can become markup.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2

from ...io.tier import Tier
from ...io.timeline import (
    COMPUTE,
    MICRO_BATCHES,
    RANKS,
    WAIT,
    Span,
    busy_seconds,
    in_turn,
)
from ..monitoring.samples import speeds
from ..monitoring.show import human_bytes, human_rate, human_seconds
from ..policy import Policy
from ..settings.reference import policy_text
from .recorded import Recorded, by_lane, num_passes

_FOLDER = Path(__file__).parent / "template"
_FIRST = (
    *(COMPUTE, MICRO_BATCHES, WAIT, RANKS),
    *("cast", Tier.DISK, "staging", Tier.HOST),
)
_HEADLINES = {
    "compute": "Computing",
    Tier.DISK: "The disk",
    Tier.HOST: "The link from host memory",
    Tier.PEER: "The link from the other GPU",
    "kv": "Keys and values on their way",
    "rows": "Too few rows",
    "activations": "Room for activations",
    "padding": "Padding",
    "width": "Narrow products",
    "ranks": "Waiting for other ranks",
    "overhead": "Starting, and reading and writing rows",
}
_NONE = "no prediction"


def templates() -> jinja2.Environment:
    """The templates of pages, filled in with autoescaping."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"bytes": human_bytes, "seconds": human_seconds}
    return environment


def render(report: Mapping[str, Any], recorded: Recorded) -> str:
    """The whole page. `report` is the content of report.json."""
    return (
        templates()
        .get_template("report.html.j2")
        .render(
            report=report,
            speed=_speed(report),
            bound=_HEADLINES.get(report["bound_by"], report["bound_by"]),
            shares=_shares(report),
            predictions=_predictions(report),
            tiers=_tiers(report),
            lanes=_lanes_in_numbers(recorded),
            ranks=_ranks(report),
            passes=round(num_passes(recorded.spans)) or 1,
            asked=_as_yaml(report["asked"]),
            policy=_as_yaml(report["policy"]),
            data=picture_data(report, recorded),
        )
    )


def picture_data(report: Mapping[str, Any], recorded: Recorded) -> dict[str, Any]:
    """The data that the scripts draw. Times are in microseconds since the job began."""
    names: dict[str, int] = {}
    lanes = []
    for rank, kind, spans in _lanes_of(recorded):
        rows = [
            [
                names.setdefault(span.name, len(names)),
                round((span.start_seconds - recorded.began_seconds) * 1e6),
                round(span.seconds * 1e6),
                span.nbytes,
            ]
            for span in in_turn(spans)
        ]
        name = kind if rank is None else f"rank {rank}: {kind}"
        lanes.append({"name": name, "kind": kind, "rank": rank, "spans": rows})
    return {
        "names": list(names),
        "lanes": lanes,
        "memory": [
            [sample.seconds, sample.resident_bytes, sample.device_bytes]
            for sample in recorded.samples
        ],
        "working_set_bytes": report["device_memory_bytes"],
        "speeds": [
            [step.start_seconds, step.end_seconds, step.tokens_per_second]
            for step in speeds(recorded.samples)
        ],
        "mean_speed": report.get(
            "output_tokens_per_second", report["tokens_per_second"]
        ),
        "roofline": report["roofline"],
    }


def _speed(report: Mapping[str, Any]) -> dict[str, str]:
    if "output_tokens" in report:
        rate, what = report["output_tokens_per_second"], "output tokens a second"
        done = (
            f"{report['output_tokens']:,} tokens were generated for {report['rows']:,} "
            f"rows (after {report['prompt_tokens']:,} of their prompts)"
        )
    else:
        rate, what = report["tokens_per_second"], "tokens a second"
        done = f"{report['tokens']:,} tokens of {report['rows']:,} rows went through"
    number = f"{rate:,.0f}" if rate >= 100 else f"{rate:,.1f}"
    return {
        "number": number,
        "unit": what,
        "done": f"{done} in {human_seconds(report['seconds'])}, after "
        f"{human_seconds(report['load_seconds'])} of loading.",
    }


def _shares(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How the time divides into computing, waiting, and the rest."""
    waiting, for_kv = report["wait_seconds"], report["kv"]["wait_seconds"]
    for_ranks = report.get("ranks", {}).get("wait_seconds", 0.0)
    rest = report["seconds"] - report["compute_seconds"] - waiting - for_ranks
    rest = max(0.0, rest)
    computing = report["compute_seconds"] - for_kv
    total = computing + for_kv + waiting + for_ranks + rest or 1.0
    return [
        {"name": name, "kind": kind, "seconds": seconds, "share": seconds / total}
        for name, kind, seconds in (
            ("computing", "compute", computing),
            ("waiting for weights", "wait", waiting),
            ("waiting for keys and values", "wait", for_kv),
            *([("waiting for other ranks", "wait", for_ranks)] if for_ranks else []),
            ("the rest", "rest", rest),
        )
    ]


def _predictions(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, predicted, measured) of each figure; a figure without prediction says
    so."""
    plan = report["plan"]
    shown = [
        (name, _NONE if guess is None else f"{guess:.1%}", f"{plan[key]:.1%}")
        for name, key, guess in (("MFU", "mfu", plan.get("predicted_mfu")),)
        if plan.get(key) is not None
    ]
    if (price := plan.get("cost_per_million_tokens")) is not None:
        shown.append(("price of a million tokens", _NONE, f"{price:,.3g}"))
    speed, seconds = (
        plan.get(f"predicted_{key}") for key in ("tokens_per_second", "seconds")
    )
    return [
        (
            "tokens a second",
            plan.get("note", _NONE) if speed is None else f"{speed:,.1f}",
            f"{report['tokens_per_second']:,.1f}",
        ),
        ("bound by", plan.get("predicted_bound_by") or _NONE, report["bound_by"]),
        ("passes", _number(plan.get("passes")), _number(report["passes"])),
        (
            "micro-batches in flight",
            _number(plan.get("micro_batches_in_flight")),
            f"{_number(report['max_in_flight'])} at most",
        ),
        (
            "seconds",
            _NONE if seconds is None else human_seconds(seconds),
            human_seconds(report["seconds"]),
        ),
        *shown,
    ]


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:,}"


def _tiers(report: Mapping[str, Any]) -> list[dict[str, str]]:
    found = []
    for tier, nbytes in report["bytes_by_tier"].items():
        read = report["bytes_read"].get(tier, 0)
        speed = report["link_bytes_per_second"].get(tier)
        if nbytes or read:
            found.append(
                {
                    "tier": tier,
                    "weights": human_bytes(nbytes),
                    "read": human_bytes(read) if read else "–",
                    "speed": human_rate(speed) if speed and read else "–",
                }
            )
    return found


def _lanes_of(recorded: Recorded) -> Iterator[tuple[int | None, str, list[Span]]]:
    """The rank, the kind and the spans of each lane; None for a process alone."""
    first = 0 if recorded.others else None
    for lane, spans in _in_order(by_lane(recorded.spans)):
        yield first, lane, spans
    for other in recorded.others:
        for lane, spans in _in_order(by_lane(other.spans)):
            if lane != MICRO_BATCHES:
                yield other.rank, lane, spans


def _ranks(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The counters of each rank; empty for a process alone."""
    return [
        {
            "rank": f"{one['rank']}",
            "host": one["host"],
            "read": human_bytes(sum(one["bytes_read"].values())),
            "sent": f"{one['num_sent']:,} ({human_bytes(one['bytes_sent'])})",
            "computed": human_seconds(one["compute_seconds"]),
            "for_weights": human_seconds(one["wait_seconds"]),
            "for_ranks": human_seconds(one["rank_wait_seconds"]),
        }
        for one in report.get("per_rank", ())
    ]


def _lanes_in_numbers(recorded: Recorded) -> list[dict[str, str]]:
    """The timeline in numbers, for readers who cannot see it."""
    spans = recorded.spans
    if not spans:
        return []
    start = min(span.start_seconds for span in spans)
    whole = max(span.end_seconds for span in spans) - start or 1.0
    found = []
    for rank, kind, of_lane in _lanes_of(recorded):
        lane = kind if rank is None else f"rank {rank}: {kind}"
        busy = busy_seconds(in_turn(of_lane))
        nbytes = sum(span.nbytes for span in of_lane)
        found.append(
            {
                "lane": lane,
                "busy": human_seconds(busy),
                "share": f"{busy / whole:.0%}",
                "count": f"{len(of_lane):,}",
                "bytes": human_bytes(nbytes) if nbytes else "–",
                "speed": human_rate(nbytes / busy) if nbytes and busy else "–",
            }
        )
    return found


def _in_order(lanes: Mapping[str, list[Span]]) -> list[tuple[str, list[Span]]]:
    def place(lane: str) -> tuple[int, str]:
        return (_FIRST.index(lane) if lane in _FIRST else len(_FIRST), lane)

    return sorted(lanes.items(), key=lambda item: place(item[0]))


def _as_yaml(values: Mapping[str, Any]) -> str:
    if not values:
        return "# nothing was set: all as by default\n"
    return policy_text(Policy(**values), is_whole=False)
