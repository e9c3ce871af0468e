"""Rows on a cluster: scored as on one machine, those of a worker that died, too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_score import ROWS

import penstock
from checkpoint import make_checkpoint
from penstock import Mapper, Policy
from penstock.io.errors import UsageError
from ray_cluster import ENVIRONMENT, ray_nodes

pa = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")

POLICY = {"device_memory": "220KiB", "gather_rows": 1000, "resident_below": 10}
MANY = [{**ROWS[n % 5], "id": n} for n in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    return make_checkpoint(path, "tiny", dtype="float32", shards_of="100KB")


def scores(folder: Path, rows: list[dict[str, object]]) -> list[dict[str, object]]:
    with penstock.load(folder, Policy(**POLICY)) as model:
        return list(penstock.score(model, rows))


@pytest.mark.usefixtures("no_leaks")
def test_a_table_comes_back_with_the_results_columns(folder: Path) -> None:
    rows = [{**row, "id": str(row["id"])} for row in (*ROWS, {"id": "x", "text": ""})]
    mapper = Mapper(folder, POLICY)
    columns = ("id", "text", "prompt", "completion")
    schema = pa.schema([(column, "string") for column in columns])
    table = mapper(pa.Table.from_pylist(rows, schema))
    mapper.close()
    mapper.close()
    found = table.to_pylist()
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert found[0]["text"] == ROWS[0]["text"], "the input's columns stay"
    for row, result in zip(found, scores(folder, ROWS), strict=False):
        assert row["logprob"] == result["logprob"]
        assert row["tokens"] == result["tokens"]
        assert row["error"] is None
    assert found[-1]["logprob"] is None
    assert found[-1]["error"]
    types = {field.name: str(field.type) for field in table.schema}
    assert types["logprob"] == "double"
    assert types["tokens"] == "int64"
    assert types["error"] == "string"


@pytest.mark.usefixtures("no_leaks")
def test_columns_have_their_types_whatever_the_rows(folder: Path) -> None:
    """Or the tables of different workers would not fit together."""
    mapper = Mapper(folder, POLICY, task="generate", max_new_tokens=2)
    fine = mapper(pa.table({"id": [1], "prompt": ["one"]}))
    failed = mapper(pa.table({"id": [1], "prompt": ["word " * 5_000]}))
    mapper.close()
    assert fine.schema == failed.schema
    assert fine["tokens"].to_pylist() == [2]
    assert "context" in failed["error"].to_pylist()[0]


def test_a_task_that_is_none_is_named(folder: Path) -> None:
    with pytest.raises(UsageError, match="no task 'skore': score, generate"):
        Mapper(folder, task="skore")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    pytest.importorskip("ray")
    cores = sorted(os.sched_getaffinity(0))
    with ray_nodes([cores[0], cores[-1]]) as address:
        yield address


def run(*arguments: object) -> str:
    """What a script on the cluster prints, in a process of its own."""
    here = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(here)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.whole
@pytest.mark.slow
def test_a_cluster_of_two_nodes_does_all_rows_once(
    folder: Path, cluster: str, tmp_path: Path
) -> None:
    source = tmp_path / "rows.jsonl"
    rows = [{"text": None, "prompt": None, "completion": None, **row} for row in MANY]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output, grave = tmp_path / "found.json", tmp_path / "grave"
    script = Path(__file__).parents[2] / "ray_rows.py"
    run(script, cluster, folder, source, output, grave)
    found = json.loads(output.read_text())
    assert grave.exists(), "a worker died"
    assert len({row["node"] for row in found}) == 2
    expected = scores(folder, MANY)
    assert [row["id"] for row in found] == [row["id"] for row in expected]
    for row, result in zip(found, expected, strict=True):
        assert row["logprob"] == pytest.approx(result["logprob"], abs=1e-4)
        assert row["tokens"] == result["tokens"]


@pytest.mark.slow
@pytest.mark.whole
def test_the_example_scores_files_into_files(
    folder: Path, cluster: str, tmp_path: Path
) -> None:
    texts = [row for row in MANY if "text" in row]
    for number, part in enumerate((texts[:7], texts[7:])):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
    example = Path(__file__).parents[3] / "examples" / "ray_score.py"
    settings = [f"{key}={value}" for key, value in POLICY.items()]
    run(
        *(example, folder, tmp_path / "*.jsonl", tmp_path / "scores"),
        *("--address", cluster, "--rows", 8, "--actors", 2, "--set", *settings),
    )
    found = pa.parquet.read_table(tmp_path / "scores").to_pylist()
    assert [row["id"] for row in found] == [row["id"] for row in texts]
    for row, result in zip(found, scores(folder, texts), strict=True):
        assert row["logprob"] == pytest.approx(result["logprob"], abs=1e-4)
        assert row["error"] is None


@pytest.mark.slow
@pytest.mark.whole
def test_two_nodes_share_a_model_and_score_as_one_rank(
    folder: Path, cluster: str, tmp_path: Path
) -> None:
    """Each actor takes all cores of a node, so that there is one on each."""
    source, output = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in MANY))
    example = Path(__file__).parents[3] / "examples" / "ray_ranks.py"
    settings = [f"{key}={value}" for key, value in POLICY.items()]
    said = run(
        *(example, folder, source, output, "--ranks", 2, "--cores", 2),
        *("--address", cluster, "--set", *settings),
    )
    assert "2 ranks on 2 nodes" in said
    found = [json.loads(line) for line in output.read_text().splitlines()]
    expected = scores(folder, MANY)
    assert [row["id"] for row in found] == [row["id"] for row in expected]
    for row, result in zip(found, expected, strict=True):
        assert row["logprob"] == pytest.approx(result["logprob"], abs=1e-4)
        assert row["tokens"] == result["tokens"]
