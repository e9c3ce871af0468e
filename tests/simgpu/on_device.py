"""Policies that stream tiny models on the simulated GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import penstock
from penstock import Policy
from penstock.io.errors import DoesNotFitError, PolicyError

GPU = "simgpu:0"
_PEER = {"simgpu:1": "128MiB"}
TIERS: dict[str, dict[str, Any]] = {
    "disk": {},
    "host": {"host_memory": "1GiB"},
    "peer": {"peer": _PEER},
    "mixed": {
        "host_memory": "1GiB",
        "peer": _PEER,
        "placement": {"0": "disk", "1": "host", "2": "peer", "3": "device"},
    },
}
"""By name, the keys of a policy that let weights stay there. `mixed` puts layers by
the digits of their names."""


def load_tight(folder: Path, values: Mapping[str, Any], least: int = 1) -> Any:
    """The checkpoint in the smallest of a few budgets in which it can be streamed, of
    `least` quarters of its size at least."""
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    for quarters in (1, 2, 3, 4, 6, 8, 12):
        sizes = {"gather_rows": 1000, "resident_below": 256}
        sizes["device_memory"] = total * quarters // 4
        if quarters < least:
            continue
        with contextlib.suppress(DoesNotFitError):
            try:
                return penstock.load(folder, Policy(device=GPU, **sizes, **values))
            except PolicyError:  # nothing can stay in so little
                rules = dict(values["placement"])
                del rules["3"]
                fewer = {**values, "placement": rules}
                return penstock.load(folder, Policy(device=GPU, **sizes, **fewer))
    raise AssertionError(f"{folder} cannot be streamed")
