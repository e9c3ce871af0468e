"""What a job was, what it cost and what bound it, as one JSON object."""

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..io.errors import OutputError
from .counters import Statistics
from .policy import Policy

# Below this share of waiting, faster storage would not be felt.
_WAITING_BINDS = 0.1


@dataclass(frozen=True, slots=True)
class JobFigures:
    """What the job itself counted."""

    rows: int
    rows_failed: int
    seconds: float
    load_seconds: float
    seconds_to_first_unit: float | None
    counts: Mapping[str, Any]
    """Tokens, micro-batches and tokens a second."""
    plan: Mapping[str, Any]
    """What the policy promised, and what was predicted for this machine."""


def what_bound(statistics: Statistics) -> str:
    """`disk` where computing stood still for weights, else `compute`."""
    total = statistics.wait_seconds + statistics.compute_seconds
    if total and statistics.wait_seconds / total > _WAITING_BINDS:
        return "disk"
    return "compute"


def make_report(
    model: str, policy: Policy, figures: JobFigures, statistics: Statistics
) -> dict[str, Any]:
    """The contents of report.json. Sizes in bytes, times in seconds."""
    import torch
    import transformers

    return {
        "model": model,
        "rows": figures.rows,
        "rows_failed": figures.rows_failed,
        **figures.counts,
        "seconds": figures.seconds,
        "load_seconds": figures.load_seconds,
        "seconds_to_first_unit": figures.seconds_to_first_unit,
        "bound_by": what_bound(statistics),
        "passes": statistics.passes,
        "model_bytes": statistics.model_bytes,
        "device_memory_bytes": statistics.device_memory_bytes,
        "bytes_by_tier": dict(statistics.bytes_by_tier),
        "bytes_read": dict(statistics.bytes_read),
        "bytes_loaded": statistics.bytes_loaded,
        "bytes_gathered": statistics.bytes_gathered,
        "bytes_copied": statistics.bytes_copied,
        "wait_seconds": statistics.wait_seconds,
        "compute_seconds": statistics.compute_seconds,
        "peak_device_bytes": statistics.peak_device_bytes,
        "peak_host_bytes": statistics.peak_host_bytes,
        "held_bytes_per_micro_batch": statistics.held_bytes_per_micro_batch,
        "num_joint_calls": statistics.num_joint_calls,
        "num_joint_rows": statistics.num_joint_rows,
        "kv": asdict(statistics.kv),
        "plan": {
            **figures.plan,
            "streamed_bytes_per_pass": statistics.bytes_by_tier["disk"],
        },
        "faults": dict(statistics.faults),
        "fallbacks": list(statistics.fallbacks),
        "policy": policy.model_dump(mode="json"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def write_report(folder: Path, report: dict[str, Any]) -> Path:
    """Writes report.json into `folder`, which is made if need be."""
    path = folder / "report.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    return path
