"""Whatever a checkpoint stores and a policy asks for, ranks give what one gives."""

from __future__ import annotations

import importlib.util
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from rank_threads import Ranks, none_failed
from ranked_kinds import KINDS, OWN, SHARED
from test_ranked_tasks import TASKS, one_policy

import penstock
from shares import shared

pytest.importorskip("accelerate", reason="transformers dequantises only with it")
HAS_LIBRARY = importlib.util.find_spec("compressed_tensors") is not None


def results(model: Any) -> list[Any]:
    return [list(TASKS[task](model)) for task in ("score", "generate")]


@pytest.mark.parametrize(
    ("kind", "name"),
    shared(
        list(product(KINDS, SHARED)),
        lambda _, case: case in (("fp8", "usual"), ("qwen3_moe", "kv in int8")),
    ),
)
def test_ranks_with_policies_of_their_own_give_what_one_gives(
    kind: str, name: str, tmp_path: Path
) -> None:
    if kind == "int4" and not HAS_LIBRARY:
        pytest.skip('needs compressed-tensors: pip install "penstock[quantised]"')
    folder = KINDS[kind](tmp_path)
    values = {**SHARED[name], "resident_below": 1}
    policy = one_policy(tmp_path, **values)
    with penstock.load(folder, policy.model_copy(update={"ranks": None})) as model:
        wanted = results(model)
    assert not any("error" in row for part in wanted for row in part)
    policies = [one_policy(tmp_path, **values, **own) for own in OWN]
    with Ranks(folder, 2, policies) as ranks:
        assert none_failed(ranks.run(lambda _, model: results(model))) == [wanted] * 2
