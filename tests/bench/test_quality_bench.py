"""The benchmark of quantised quality runs at toy size; its text and its model are made
as it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import forked_python
from common.machine_text import documentation

BENCH = Path(__file__).parents[2] / "bench"


def test_text_is_held_out_by_files_and_is_always_the_same() -> None:
    training, held_out = documentation(60_000)
    assert sum(map(len, training + held_out)) >= 60_000
    assert held_out
    assert not {*training} & {*held_out}
    assert documentation(60_000) == (training, held_out)


@pytest.mark.whole
@pytest.mark.slow
def test_the_benchmark_of_quality_trains_quantises_and_compares(tmp_path: Path) -> None:
    options = "--steps 3 --layers 1 --length 32 --letters 60000 --rows 8 --ways fp8"
    done = forked_python.run(
        BENCH / "quality.py", *options.split(), "--models", tmp_path
    )
    assert done.returncode in (0, 1), done.stderr  # three steps teach it nothing
    found = json.loads(done.stdout.splitlines()[-1])
    (result,) = found["results"]
    assert result["way"] == "fp8"
    assert result["original_stored_bytes"] > result["stored_bytes"]
    assert 0 < result["weights_relative_error"] < 0.05
    assert found["held_out_rows"] == len(documentation(60_000)[1])
    assert found["trained_tokens"] == 3 * 8 * 32
    assert found["perplexity"] > 1
    assert found["perplexity_by_frequency"] < found["perplexity_evenly"] == 1024


def test_blocks_in_fp8_are_near_to_what_they_were() -> None:
    from quality import fp8_blocks

    weight = torch.randn(200, 130)
    numbers, scales = fp8_blocks(weight)
    assert scales.shape == (2, 2)
    wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:200, :130]
    assert torch.allclose(numbers.float() * wide, weight, rtol=0.07, atol=1e-4)
