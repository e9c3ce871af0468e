"""How vectors are made is read from the files of sentence-transformers, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.io.errors import CheckpointError
from penstock.offload.tasks.pooling import Pooled, pooled


def model(folder: Path, config: dict[str, Any], *more: str) -> Any:
    kinds = ("Transformer", "Pooling", *more)
    modules = [{"type": f"st.{kind}", "path": kind} for kind in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "Pooling").mkdir()
    (folder / "Pooling" / "config.json").write_text(json.dumps(config))
    return SimpleNamespace(config=SimpleNamespace(name_or_path=str(folder)))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}, "mean"),
        ({"pooling_mode": "mean", "embedding_dimension": 8}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["cls"]}, "cls"),
    ],
)
def test_both_spellings_are_read(
    config: dict[str, Any], expected: Any, tmp_path: Path
) -> None:
    asked = pooled(model(tmp_path, config, "Normalize"), "auto", None)
    assert asked == Pooled(expected, normalize=True)


@pytest.mark.parametrize("named", ["weightedmean", ["mean", "max"], None, 5, True])
def test_a_pooling_that_is_unknown_is_refused_unless_another_is_asked_for(
    named: Any, tmp_path: Path
) -> None:
    given = model(tmp_path, {"pooling_mode": named})
    with pytest.raises(CheckpointError, match="name one of"):
        pooled(given, "auto", None)
    assert pooled(given, "mean", None) == Pooled("mean", normalize=False)


def test_modules_that_are_unknown_are_refused_by_name(tmp_path: Path) -> None:
    given = model(tmp_path, {"pooling_mode": "mean"}, "Dense")
    with pytest.raises(CheckpointError, match="Dense"):
        pooled(given, "auto", None)


@pytest.mark.parametrize("text", ["[" * 100_000, "[1, 2]", '[{"type": 5}]', "\0"])
def test_a_file_that_lists_no_modules_is_refused(text: str, tmp_path: Path) -> None:
    given = model(tmp_path, {"pooling_mode": "mean"})
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"modules\.json is no"):
        pooled(given, "auto", None)
