"""Adapters are applied to streamed models by PEFT, or it is said that they are not."""

from __future__ import annotations

import builtins
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint_contents import Words

import penstock
import zoo
from penstock import Policy
from penstock.io.errors import CheckpointError, UsageError
from penstock.offload.jobs.identity import adapter_digests
from penstock.offload.verify import verify

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.usefixtures("no_leaks"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Found missing adapter keys"),
]

POLICY = Policy(device_memory=300_000, resident_below=1)
ROWS = [{"id": 1, "text": "3 4 5 6 7"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    zoo.save_checkpoint("llama", folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False
    )
    peft.get_peft_model(zoo.load("llama", base), config).save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(**zoo.inputs("llama")).logits
    return found


def resident(base: Path, adapter: Path) -> torch.Tensor:
    return logits(peft.PeftModel.from_pretrained(zoo.load("llama", base), adapter))


def test_an_adapter_is_applied(base: Path, adapter: Path) -> None:
    expected = resident(base, adapter)
    with penstock.load(base, POLICY, adapter=adapter) as model:
        assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), expected)
        assert penstock.statistics(model).faults == {}
    with penstock.load(base, Policy(**{**dict(POLICY), "adapter": adapter})) as model:
        assert torch.equal(logits(model), expected)


def test_a_model_that_peft_has_wrapped_up_is_scored(base: Path, adapter: Path) -> None:
    with penstock.load(base, POLICY, adapter=adapter) as model:
        expected = list(penstock.score(model, ROWS, tokenizer=Words()))
    with penstock.load(base, POLICY) as model:
        without = list(penstock.score(model, ROWS, tokenizer=Words()))
        wrapped = peft.PeftModel.from_pretrained(model, adapter)
        assert list(penstock.score(wrapped, ROWS, tokenizer=Words())) == expected
        assert expected != without
        assert penstock.statistics(wrapped).passes > 0


def test_an_adapter_is_not_merged_into_streamed_weights(
    base: Path, adapter: Path
) -> None:
    with penstock.load(base, POLICY) as model:
        wrapped = peft.PeftModel.from_pretrained(model, adapter)
        with pytest.raises(penstock.PenstockError, match=r"penstock\.update"):
            wrapped.merge_and_unload()


def test_an_adapter_beside_a_model_is_announced(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    for folder in (adapter, base):
        for path in folder.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with penstock.load(tmp_path, POLICY) as model:
        said = penstock.statistics(model).fallbacks
        assert any("LORA" in s and "--adapter" in s for s in said)


def test_a_folder_with_nothing_but_an_adapter_is_refused(adapter: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter, not a model.*base.*--adapter"):
        penstock.load(adapter, POLICY)


def test_what_is_no_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no adapter"):
        penstock.load(base, POLICY, adapter=tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
        penstock.load(base, POLICY, adapter=tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(UsageError, match="does not fit LlamaForCausalLM"):
        penstock.load(base, POLICY, adapter=tmp_path)


def test_an_adapter_brings_no_code_and_stops_nobody(base: Path, tmp_path: Path) -> None:
    config = tmp_path / "adapter_config.json"
    asked = {"peft_type": "LORA", "megatron_config": {"x": 1}, "megatron_core": "this"}
    config.write_text(json.dumps(asked))
    with pytest.raises(CheckpointError, match=r"megatron_core: 'this'.*is not run"):
        penstock.load(base, POLICY, adapter=tmp_path)
    config.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"has no adapter.*too deep"):
        penstock.load(base, POLICY, adapter=tmp_path)
    config.unlink()
    os.mkfifo(config)
    with pytest.raises(CheckpointError, match="not a regular file"):
        penstock.load(base, POLICY, adapter=tmp_path)


def test_what_an_adapter_does_not_use_of_its_tensors_is_announced(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    shutil.copytree(adapter, tmp_path / "less")
    config = tmp_path / "less" / "adapter_config.json"
    values = json.loads(config.read_text()) | {"target_modules": ["q_proj"]}
    config.write_text(json.dumps(values))
    for folder, is_said in ((tmp_path / "less", True), (adapter, False)):
        with penstock.load(base, POLICY, adapter=folder) as model:
            said = penstock.statistics(model).fallbacks
            assert any("have no place" in s and "up_proj" in s for s in said) == is_said


def test_an_adapter_has_no_number_that_is_none(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    shutil.copytree(adapter, tmp_path / "nan")
    config = tmp_path / "nan" / "adapter_config.json"
    values = json.loads(config.read_text()) | {"lora_alpha": float("nan")}
    config.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="lora_alpha: nan"):
        penstock.load(base, POLICY, adapter=tmp_path / "nan")


def test_without_peft_it_is_said_in_one_sentence(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "peft":
            raise ImportError("no peft")
        return there(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UsageError, match=r"penstock\[peft\]"):
        penstock.load(base, POLICY, adapter=adapter)


def test_another_adapter_is_another_job(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert adapter_digests(adapter) != adapter_digests(tmp_path)
    assert adapter_digests(adapter) == adapter_digests(adapter)


def changed(adapter: Path, folder: Path, **keys: Any) -> Path:
    """The adapter in `folder`, with other values of its config."""
    for path in adapter.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((adapter / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **keys}))
    return folder


@pytest.mark.parametrize(
    ("keys", "error", "words"),
    [
        ({"target_modules": "(([a-z_.0-9])+)+Z"}, CheckpointError, "more than 5 s"),
        pytest.param(
            {"exclude_modules": "(([a-z_.0-9])+)+Z"},
            CheckpointError,
            "more than 5 s",
            marks=pytest.mark.whole,
        ),
        (
            {"rank_pattern": {"(([a-z_.0-9])+)+Z": 1}},
            CheckpointError,
            "repetitions inside",
        ),
        (
            {"rank_pattern": {f"x{n}": 1 for n in range(9_999)}},
            CheckpointError,
            "names .* things",
        ),
        ({"r": 10**7}, UsageError, "does not fit.*size mismatch"),
        (
            {"use_dora": True},
            CheckpointError,
            "lacks the tensor of .*lora_magnitude_vector",
        ),
        (
            {"target_modules": ["q_proj", "up_proj", "v_proj"]},
            CheckpointError,
            r"lacks the tensor of .*v_proj\.lora_A",
        ),
    ],
)
def test_an_adapters_config_asks_for_no_more_than_its_files_have(
    keys: dict[str, Any],
    error: type[Exception],
    words: str,
    base: Path,
    adapter: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=words):
        penstock.load(base, POLICY, adapter=changed(adapter, tmp_path, **keys))


def test_an_expression_for_modules_is_taken(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    asked = r".*\.(q_proj|up_pro[j]+)"
    found = changed(adapter, tmp_path, target_modules=asked)
    with penstock.load(base, POLICY, adapter=found) as model:
        assert torch.equal(logits(model), resident(base, adapter))


def test_an_adapter_replaces_no_weight_of_the_model(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    changed(adapter, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    name = "base_model.model.model.embed_tokens.weight"
    table = zoo.load("llama", base).get_input_embeddings().weight.detach().clone()
    save_file({**load_file(path), name: table}, path)
    with pytest.raises(CheckpointError, match=r"a weight of the model itself.*embed"):
        penstock.load(base, POLICY, adapter=tmp_path)


def test_a_checkpoint_is_verified_without_adapters(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"take adapter .* out of the policy"):
        verify(base, Policy(adapter=adapter))
    changed(adapter, tmp_path)
    for path in base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert verify(tmp_path, POLICY).is_equal


def test_nothing_in_an_adapters_folder_is_waited_for(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_bytes(
        (adapter / "adapter_config.json").read_bytes()
    )
    (tmp_path / "adapter_old").mkdir()
    digests = adapter_digests(tmp_path)
    assert list(digests) == ["adapter_config.json"]
    for name in ("adapter_model.safetensors", "adapter_model.bin", "adapter_x"):
        os.mkfifo(tmp_path / name)
        for read in (
            adapter_digests,
            lambda folder: penstock.load(base, POLICY, adapter=folder),
        ):
            with pytest.raises(
                CheckpointError, match=f"{name}: it is not a regular file"
            ):
                read(tmp_path)
        (tmp_path / name).unlink()
