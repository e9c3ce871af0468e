"""Jobs on the simulated GPU give what they give on the CPU, whatever the policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import penstock
from checkpoint import make_checkpoint
from on_device import GPU
from penstock import Policy
from shares import shared
from sim_device import SimGpu

pytestmark = [pytest.mark.simgpu, pytest.mark.usefixtures("few_objects")]

TEXTS = [
    "The quick brown fox jumps over",
    "import os\nprint(",
    "Two words",
    "A",
    "Zwölf Boxkämpfer jagen Viktor quer über den",
    "The quick brown dog",
    "Once upon a time there was",
]
PROMPTS = [{"id": number, "prompt": text} for number, text in enumerate(TEXTS)]
ROWS: dict[str, list[dict[str, Any]]] = {
    "score": [{"id": number, "text": text} for number, text in enumerate(TEXTS)],
    "embed": [{"id": number, "text": text} for number, text in enumerate(TEXTS)],
    "classify": [{**row, "labels": [" a", " fox", "xy"]} for row in PROMPTS],
    "generate": PROMPTS,
}
GENERATE = {"max_new_tokens": 5}
SMALL: dict[str, Any] = {
    "device_memory": "220KiB",
    "resident_below": 10,
    "micro_batch_tokens": 32,
    "tokens_in_flight": 96,
    "micro_batch_sequences": 2,
    "sequences_in_flight": 6,
    "coalesce": "off",
}


@dataclass(frozen=True)
class Case:
    """A task, its options, and what the policy has beside `SMALL`."""

    task: str
    options: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)


def generating(**values: Any) -> Case:
    return Case("generate", GENERATE, values)


KV_DISK = {"tier": "disk", "staging_memory": "64KiB"}
CASES: dict[str, Case] = {
    "score": Case("score"),
    "score, rows gathered": Case("score", {}, {"gather_rows": 1000}),
    "score, activations out": Case("score", {}, {"activations": "host"}),
    "score in windows": Case("score", {"window": 8, "stride": 4}),
    "score, host and peer": Case(
        "score", {}, {"host_memory": "100KiB", "peer": {"simgpu:1": "100KiB"}}
    ),
    "embed": Case("embed"),
    "classify": Case("classify"),
    "generate": generating(),
    "generate, shared products": generating(coalesce="on"),
    "generate, prompts in parts": generating(prompt_tokens=2, coalesce="auto"),
    "generate, activations out": generating(activations="host"),
    "kv on the device": generating(kv={"tier": "device"}),
    "kv in host memory": generating(kv={"tier": "host"}),
    "kv on disk": generating(kv=KV_DISK),
    "kv over tiers": generating(kv={"tier": "device", "limits": {"device": "8KiB"}}),
    "kv in int8": generating(kv={"tier": "host", "dtype": "int8"}),
    "kv in int8 on the device": generating(kv={"tier": "device", "dtype": "int8"}),
    "attention on the host": generating(kv={"tier": "host", "attention": "host"}),
    "kv in host memory, activations out, shared products": generating(
        kv={"tier": "host"}, activations="host", coalesce="on"
    ),
    "beams": Case("generate", {**GENERATE, "num_beams": 3}),
    "beams with kv on disk": Case(
        "generate", {**GENERATE, "num_beams": 3}, {"kv": KV_DISK}
    ),
    "sampling": Case("generate", {**GENERATE, "do_sample": True, "seed": 3}),
    "several samples": Case(
        "generate", {**GENERATE, "do_sample": True, "num_return_sequences": 2}
    ),
    "sampled beams": Case("generate", {**GENERATE, "do_sample": True, "num_beams": 2}),
    "repetition": Case("generate", {**GENERATE, "repetition_penalty": 1.5}),
}


def results_of(folder: Path, case: Case, device: str) -> list[dict[str, Any]]:
    values = {**SMALL, **case.values}
    if device == "cpu":  # what only other devices have leaves results as they are
        values.pop("peer", None)
    with penstock.load(folder, Policy(device=device, **values)) as model:
        run = getattr(penstock, case.task)
        return list(run(model, ROWS[case.task], **case.options))


KEPT = (
    "score, host and peer",
    "kv in host memory, activations out, shared products",
    "sampling",
)
PARTS = [list(KEPT), *(list(CASES)[start::3] for start in range(3))]


@pytest.mark.parametrize("names", shared(PARTS, lambda place, _: place == 0))
def test_jobs_give_the_cpus_results(
    simgpu: SimGpu, tmp_path: Path, names: list[str]
) -> None:
    folder = make_checkpoint(
        tmp_path / "tiny", "tiny", dtype="float32", shards_of="100KB"
    )
    different = {}
    for seed, name in enumerate(names):
        case = CASES[name]
        simgpu.schedule(0, most_held_ops=0)
        expected = results_of(folder, case, "cpu")
        simgpu.schedule(seed)
        found = results_of(folder, case, GPU)
        if found != expected or any("error" in row for row in found):
            different[name] = (found, expected)
    assert not different
