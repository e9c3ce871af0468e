"""Rows that end early, on the simulated GPU: the host learns of it later than the
device, and results are the CPU's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_on_tasks import PROMPTS, SMALL

import penstock
from checkpoint import make_checkpoint
from on_device import GPU
from penstock import Policy
from shares import shared
from sim_device import SimGpu

pytestmark = [pytest.mark.simgpu, pytest.mark.usefixtures("few_objects")]

ENDS = {"max_new_tokens": 6, "eos_token_id": list(range(0, 400, 3))}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "each row alone": (ENDS, {"micro_batch_sequences": 1}),
    "rows leave": (
        ENDS,
        {"micro_batch_sequences": 4, "coalesce": "on", "kv": {"tier": "host"}},
    ),
    "rows leave, one micro-batch": (
        {**ENDS, "do_sample": True, "seed": 5},
        {"micro_batch_sequences": 8, "sequences_in_flight": 8, "coalesce": "on"},
    ),
    "nothing can be drawn": (
        {"max_new_tokens": 3, "do_sample": True, "suppress_tokens": list(range(1024))},
        {},
    ),
}


def results_of(folder: Path, device: str, name: str) -> list[dict[str, Any]]:
    options, values = CASES[name]
    with penstock.load(folder, Policy(device=device, **{**SMALL, **values})) as model:
        rows = [{**row, "id": n} for n, row in enumerate(PROMPTS * 2)]
        return list(penstock.generate(model, rows, **options))


@pytest.mark.parametrize("name", shared(list(CASES), lambda place, _: place == 1))
def test_rows_that_end_early_have_the_cpus_results(
    simgpu: SimGpu, tmp_path: Path, name: str
) -> None:
    folder = make_checkpoint(tmp_path / "tiny", "tiny", dtype="float32")
    simgpu.schedule(0, most_held_ops=0)
    expected = results_of(folder, "cpu", name)
    reasons = {row.get("finish_reason", "error") for row in expected}
    assert "stop" in reasons or reasons == {"error"}
    simgpu.schedule(1)
    assert results_of(folder, GPU, name) == expected
