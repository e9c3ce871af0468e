"""A run that never was: what a report is made of, with figures of our own."""

from __future__ import annotations

from typing import Any

from penstock.io.timeline import Span
from penstock.offload.monitoring.samples import ResourceSample
from penstock.offload.reports.rank_record import RankRecord
from penstock.offload.reports.recorded import Recorded

BEGAN = 1000.0
"""The clock's time when the job began; a power of two fits a float well enough."""


def spans(
    num_passes: int = 3, num_sites: int = 12, *, read_seconds: float = 0.3
) -> list[Span]:
    """Four micro-batches of 0.05 s at each site, while the next unit is read."""
    found, now = [], BEGAN + 2.0
    link = now
    for _ in range(num_passes):
        for site in range(num_sites):
            name = f"model.layers.{site}"
            begun, link = link, link + read_seconds
            found.append(Span("disk", name, begun, link, 300_000_000))
            found.append(Span("cast", name, link - 0.04, link, 300_000_000))
            there = max(now, link)
            found.append(Span("wait", name, now, there))
            now = there
            for index in range(4):
                start = now + 0.05 * index
                found.append(Span("micro-batches", f"{index}", start, start + 0.05))
            found.append(Span("compute", name, now, now + 0.2))
            now += 0.2
    return found


def samples(num: int = 60) -> list[ResourceSample]:
    return [
        ResourceSample(
            seconds=0.25 * i,
            stage="loading" if i < 8 else "scoring",
            stage_seconds=0.25 * (i if i < 8 else i - 8),
            rows=float(max(0, i - 8)),
            num_rows=num - 8,
            tokens=2048 * (max(0, i - 8) // 14),
            passes=0 if i < 8 else 1 + (i - 8) // 14,
            bytes_read={"disk": 60_000_000 * max(0, i - 8)},
            wait_seconds=0.1 * max(0, i - 8),
            compute_seconds=0.15 * max(0, i - 8),
            resident_bytes=(300 + min(i, 20) * 40 + i % 5 * 10) << 20,
        )
        for i in range(num)
    ]


def recorded(**options: Any) -> Recorded:
    return Recorded(BEGAN, spans(**options), samples())


def of_ranks() -> Recorded:
    """A run of two ranks: the second one computes half as long in the first second."""
    other = RankRecord(
        rank=1,
        host="a-machine",
        bytes_read={"disk": 150_000_000},
        bytes_sent=4096,
        num_sent=4,
        rank_wait_seconds=1.5,
        wait_seconds=0.25,
        compute_seconds=3.0,
        peak_host_bytes=300 << 20,
        spans=[
            Span("compute", "model.layers.1", BEGAN + 2.0, BEGAN + 2.5),
            Span("micro-batches", "0", BEGAN + 2.0, BEGAN + 2.5),
            Span("ranks", "other ranks", BEGAN + 2.5, BEGAN + 3.0),
            Span("disk", "model.layers.1", BEGAN + 2.0, BEGAN + 2.9, 150_000_000),
        ],
    )
    return Recorded(BEGAN, spans(), samples(), [other])


def report(**values: Any) -> dict[str, Any]:
    """A report of a disk-bound run, as `make_report` makes it."""
    return {
        "model": "models/llama-of-nobody",
        "rows": 52,
        "rows_failed": 0,
        "tokens": 6144,
        "tokens_padding": 60,
        "micro_batches": 12,
        "tokens_per_second": 568.9,
        "seconds": 10.8,
        "load_seconds": 2.0,
        "seconds_to_first_unit": 2.3,
        "cpu_taken_elsewhere": 0.0,
        "bound_by": "disk",
        "bound": {
            "by": "disk",
            "share": 0.33,
            "why": "Computing waited 33% of the time for weights from disk.",
            "advice": [
                {
                    "setting": "tokens_in_flight: 3328",
                    "effect": "1.5x more tokens in flight would hide it: they share "
                    "each pass over the weights.",
                },
                {
                    "setting": "host_memory: 1.2GiB",
                    "effect": "33% of the streamed weights would be read once and "
                    "stay in host memory.",
                },
            ],
        },
        "roofline": {
            "tokens_per_pass": 2048.0,
            "tokens_per_second": 568.9,
            "compute_tokens_per_second": 853.3,
            "passes_per_second": 0.278,
        },
        "link_bytes_per_second": {"disk": 1.0e9},
        "passes": 3,
        "model_bytes": 3_700_000_000,
        "device_memory_bytes": 1 << 29,
        "bytes_by_tier": {
            "device": 100_000_000,
            "peer": 0,
            "host": 0,
            "disk": 3_600_000_000,
        },
        "bytes_read": {"disk": 10_800_000_000},
        "wait_seconds": 3.6,
        "compute_seconds": 7.2,
        "peak_device_bytes": 1 << 29,
        "peak_host_bytes": 1_180 << 20,
        "max_in_flight": 4,
        "kv": {"wait_seconds": 0.0},
        "plan": {
            "micro_batches_in_flight": 4,
            "passes": 3,
            "streamed_bytes_per_pass": 3_600_000_000,
        },
        "dtype": "bfloat16",
        "reader": "libaio",
        "faults": {},
        "fallbacks": [],
        "policy": {"device": "cpu", "device_memory": 1 << 29, "tokens_in_flight": 2048},
        "asked": {"device_memory": 1 << 29, "tokens_in_flight": 2048},
        "computer": {
            "cpu": "A processor",
            "cores": 2,
            "threads": 2,
            "memory_bytes": 24 << 30,
            "gpus": [],
            "kernel": "Linux 6",
        },
        "versions": {"python": "3.11", "torch": "2.13"},
        **values,
    }
