"""Reports what a job did, what it cost and what bound it: as JSON, as a page, as a
trace."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...io.errors import OutputError
from ...io.tier import Tier
from ..engine.counters import Statistics
from ..machines.computer import computer, has_bfloat16, versions
from ..monitoring.memory import available_bytes
from ..policy import Policy
from .bound import what_bound
from .counts import Bound, Counts
from .page import render
from .perfetto import trace
from .recorded import Recorded, link_speeds, roofline, waits_by_tier

_SLOW_WITHOUT = ("bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class JobFigures:
    """What the job itself counted. Times are in seconds."""

    rows: int
    rows_failed: int
    seconds: float
    load_seconds: float
    seconds_to_first_unit: float | None
    counts: Mapping[str, Any]
    """Numbers of tokens and micro-batches, and tokens per second."""
    plan: Mapping[str, Any]
    """What the policy allows in flight, and the prediction for this machine."""
    dtype: str
    """The dtype that most of the weights compute in."""
    taken_elsewhere: float = 0.0
    """The share (0 to 1) of its threads' CPU time that other work on the machine
    took."""


def judge(
    policy: Policy, figures: JobFigures, statistics: Statistics, recorded: Recorded
) -> Bound:
    """Says what bound this job, and what to change."""
    counts, is_generating = figures.counts, "output_tokens" in figures.counts
    positions = counts["tokens"] + counts["tokens_padding"]
    rows_per_product = positions / max(1, counts["micro_batches"])
    if is_generating:
        rows_per_product = statistics.rows_per_joint_call or min(
            policy.micro_batch_sequences, max(1, figures.rows)
        )
    spans, others = recorded.spans, recorded.others
    waits = waits_by_tier(spans, statistics.wait_seconds, statistics.bytes_read)
    in_flight = policy.tokens_in_flight
    micro_batch = policy.micro_batch_tokens
    if is_generating:
        in_flight = policy.sequences_in_flight
        micro_batch = policy.micro_batch_sequences
    is_on_cpu = policy.device == "cpu"
    return what_bound(
        Counts(
            seconds=figures.seconds,
            compute_seconds=statistics.compute_seconds,
            wait_seconds=waits,
            kv_wait_seconds=statistics.kv.wait_seconds,
            rank_wait_seconds=statistics.ranks.wait_seconds,
            others_wait_seconds=max((one.wait_seconds for one in others), default=0.0),
            kv_bytes=statistics.kv.peak_bytes_held,
            has_lossy_kv=policy.kv.dtype != "auto",
            tokens=counts["tokens"],
            tokens_padding=counts["tokens_padding"],
            rows=figures.rows,
            micro_batches=counts["micro_batches"],
            max_in_flight=statistics.max_in_flight,
            width=figures.plan["micro_batches_in_flight"],
            is_generating=is_generating,
            in_flight=in_flight,
            micro_batch=micro_batch,
            rows_per_product=rows_per_product,
            is_coalesced=statistics.num_joint_calls > 0,
            is_compiled=policy.compile,
            has_slow_dtype=is_on_cpu
            and figures.dtype in _SLOW_WITHOUT
            and not has_bfloat16(),
            streamed_bytes=statistics.bytes_by_tier[Tier.DISK],
            host_memory=policy.host_memory or 0,
            free_host_bytes=available_bytes(),
            taken_elsewhere=figures.taken_elsewhere if is_on_cpu else 0.0,
        )
    )


def make_report(
    model: str,
    asked: Policy,
    policy: Policy,
    figures: JobFigures,
    statistics: Statistics,
    bound: Bound,
    recorded: Recorded,
) -> dict[str, Any]:
    """The content of report.json. Sizes are in bytes, times in seconds."""
    roof = roofline(
        recorded.spans,
        tokens=figures.counts["tokens"],
        passes=statistics.passes,
        seconds=figures.seconds,
        compute_seconds=statistics.compute_seconds,
        tiers=statistics.bytes_read,
    )
    return {
        "model": model,
        "rows": figures.rows,
        "rows_failed": figures.rows_failed,
        **figures.counts,
        "seconds": figures.seconds,
        "load_seconds": figures.load_seconds,
        "seconds_to_first_unit": figures.seconds_to_first_unit,
        "cpu_taken_elsewhere": figures.taken_elsewhere,
        "bound_by": bound.by,
        "bound": asdict(bound),
        "roofline": None if roof is None else asdict(roof),
        "link_bytes_per_second": link_speeds(recorded.spans, statistics.bytes_read),
        "passes": statistics.passes,
        "model_bytes": statistics.model_bytes,
        "device_memory_bytes": statistics.device_memory_bytes,
        "memory": {**asdict(statistics.budget), "in_words": str(statistics.budget)},
        "bytes_by_tier": dict(statistics.bytes_by_tier),
        "codecs": dict(statistics.codecs),
        "bytes_read": dict(statistics.bytes_read),
        "bytes_shared": statistics.bytes_shared,
        "bytes_loaded": statistics.bytes_loaded,
        "bytes_gathered": statistics.bytes_gathered,
        "bytes_copied": statistics.bytes_copied,
        "expert_bytes_touched": statistics.expert_bytes_touched,
        "expert_bytes_loaded": statistics.expert_bytes_loaded,
        "expert_hit_rate": statistics.expert_hit_rate,
        "host_expert_bytes": statistics.host_expert_bytes,
        "host_expert_calls": statistics.host_expert_calls,
        "host_expert_tokens": statistics.host_expert_tokens,
        "host_experts_exchanged": statistics.host_experts_exchanged,
        "wait_seconds": statistics.wait_seconds,
        "compute_seconds": statistics.compute_seconds,
        "peak_device_bytes": statistics.peak_device_bytes,
        "peak_host_bytes": statistics.peak_host_bytes,
        "held_bytes_per_micro_batch": statistics.held_bytes_per_micro_batch,
        "max_in_flight": statistics.max_in_flight,
        "num_joint_calls": statistics.num_joint_calls,
        "num_joint_rows": statistics.num_joint_rows,
        "kv": asdict(statistics.kv),
        "ranks": asdict(statistics.ranks),
        "plan": {
            **figures.plan,
            "streamed_bytes_per_pass": statistics.bytes_by_tier[Tier.DISK],
        },
        "dtype": figures.dtype,
        "reader": statistics.reader,
        "faults": dict(statistics.faults),
        "fallbacks": list(statistics.fallbacks),
        "policy": policy.model_dump(mode="json"),
        "asked": asked.model_dump(mode="json", exclude_unset=True),
        "computer": computer(),
        "versions": versions(),
    }


def write_report(folder: Path, report: dict[str, Any], recorded: Recorded) -> None:
    """Writes report.json, report.html and trace.json to `folder`, which is created if
    needed. Raises OutputError."""
    write_text(folder / "report.json", json.dumps(report, indent=2) + "\n")
    write_text(folder / "report.html", render(report, recorded))
    write_text(
        folder / "trace.json", json.dumps(trace(report["model"], recorded)) + "\n"
    )


def write_text(path: Path, text: str) -> None:
    """Writes a file; its folder is created if needed. Raises OutputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
