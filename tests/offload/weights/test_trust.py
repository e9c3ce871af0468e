"""Nothing that comes with a checkpoint is code: none of it runs and nothing is asked,
whatever its files name; unless the policy trusts it."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import penstock
from checkpoint import make_checkpoint
from penstock import Policy
from penstock.io.errors import CheckpointError, PenstockError
from penstock.offload import cli
from penstock.offload.rows.text import load_tokenizer

CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class MyConfig(LlamaConfig):
    model_type = "mine"

class MyForCausalLM(LlamaForCausalLM):
    config_class = MyConfig

class MyTokenizer(PreTrainedTokenizerFast):
    pass

def generate(model, *args, **kwargs):
    return "mine"
"""
SMALL: dict[str, Any] = {"device_memory": "1MiB"}
MAPS = {
    "AutoConfig": "mine.MyConfig",
    "AutoModelForCausalLM": "mine.MyForCausalLM",
    "AutoModel": "mine.MyForCausalLM",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_checkpoint(folder, "tiny", dtype="float32", shards_of="10GB")
    return folder


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that is there once code of the checkpoint's has run."""
    return tmp_path / "mark"


@pytest.fixture
def folder(
    saved: Path,
    tmp_path: Path,
    mark: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Path]:
    """A checkpoint with Python files beside it, where nobody may ask anything."""

    def ask(*question: object) -> str:
        raise AssertionError(f"asked: {question}")

    monkeypatch.setattr(builtins, "input", ask)
    found = Path(shutil.copytree(saved, tmp_path / "model"))
    (found / "mine.py").write_text(CODE.format(mark=str(mark)))
    (found / "custom_generate").mkdir()
    (found / "custom_generate" / "generate.py").write_text(CODE.format(mark=str(mark)))
    yield found
    for name in [name for name in sys.modules if "transformers_modules" in name]:
        del sys.modules[name]  # or the next one would be taken for this one


def change(path: Path, **values: Any) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **values}))


def of_its_own_kind(folder: Path) -> None:
    change(
        folder / "config.json",
        model_type="mine",
        architectures=["MyForCausalLM"],
        auto_map=MAPS,
    )


def of_its_own_class(folder: Path) -> None:
    change(folder / "config.json", architectures=["MyForCausalLM"], auto_map=MAPS)


def of_a_kernel(folder: Path) -> None:
    change(folder / "config.json", attn_implementation="someone/kernel")


def of_a_kernel_inside(folder: Path) -> None:
    change(folder / "config.json", rope={"_attn_implementation": {"": "a/b@c:d"}})


def of_a_fetched_kernel(folder: Path) -> None:
    change(folder / "config.json", _attn_implementation_internal="flash_attention_2")


def of_fetched_experts(folder: Path) -> None:
    change(folder / "config.json", experts_implementation="deepgemm")


def of_another_file(folder: Path) -> None:
    shutil.copy(folder / "config.json", folder / "config.4.0.0.json")
    of_a_kernel(folder)
    (folder / "config.json").rename(folder / "config.4.0.0.json")
    change(folder / "config.json", configuration_files=["config.4.0.0.json"])


@pytest.mark.parametrize(
    "damage",
    [
        of_its_own_kind,
        of_its_own_class,
        of_a_kernel,
        of_a_kernel_inside,
        of_a_fetched_kernel,
        of_fetched_experts,
        of_another_file,
    ],
)
def test_a_checkpoint_that_needs_code_of_others_is_refused_by_name(
    damage: Callable[[Path], None], folder: Path, mark: Path
) -> None:
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        penstock.load(folder, SMALL)
    assert str(folder / "config.json") in str(caught.value)
    assert caught.value.exit_code == 2
    assert not mark.exists()


def test_transformers_own_class_is_taken_where_there_is_one(
    folder: Path, mark: Path
) -> None:
    change(folder / "config.json", auto_map=MAPS)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["a.B", None]})
    with penstock.load(folder, SMALL) as model:
        assert type(model).__module__.startswith("transformers.")
        rows = [{"id": 1, "text": "import os def foo return"}]
        (result,) = penstock.score(model, rows)
        (completion,) = penstock.generate(model, rows, max_new_tokens=2)
    assert "error" not in result | completion
    assert not mark.exists()


def test_a_part_of_a_model_brings_no_code_along_either(
    folder: Path, tmp_path: Path, mark: Path
) -> None:
    """Composite models make their parts by the parts' own `auto_map`, which asks."""
    import zoo

    zoo.save_checkpoint("llava", tmp_path / "llava")
    path = tmp_path / "llava" / "config.json"
    values = json.loads(path.read_text())
    values["text_config"]["auto_map"] = MAPS
    values["vision_config"]["auto_map"] = MAPS
    path.write_text(json.dumps(values))
    (tmp_path / "llava" / "mine.py").write_text(CODE.format(mark=str(mark)))
    with penstock.load(tmp_path / "llava", {"device_memory": "4MiB"}) as model:
        assert not hasattr(model.config.text_config, "auto_map")
    assert not mark.exists()


@pytest.mark.parametrize("auto_map", [["mine.MyTokenizer", None], {}, [], "x", 5])
def test_a_tokenizer_brings_no_code_along(
    auto_map: Any, folder: Path, mark: Path
) -> None:
    change(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": auto_map},
        tokenizer_class="MyTokenizer",
    )
    change(folder / "config.json", model_type="mine", auto_map=MAPS)
    with pytest.raises(PenstockError) as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value)
    assert not mark.exists()


def test_with_trust_it_runs(folder: Path, mark: Path) -> None:
    of_its_own_kind(folder)
    with penstock.load(folder, Policy(trust_remote_code=True, **SMALL)) as model:
        assert "transformers_modules" in type(model).__mro__[1].__module__
        (result,) = penstock.score(model, [{"id": 1, "text": "import os def"}])
        assert model.generate() == "mine"
    assert "error" not in result
    assert mark.exists()


def test_the_command_line_has_one_word_for_trust(
    folder: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_its_own_kind(folder)
    command = ["penstock", "plan", str(folder), "--machine", "h200", "--json"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert not mark.exists()
    monkeypatch.setattr(sys, "argv", [*command, "--trust-remote-code"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    assert mark.exists()


@pytest.mark.slow
def test_rows_from_a_pipe_answer_no_question(folder: Path, mark: Path) -> None:
    change(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["mine.MyTokenizer", None]},
        tokenizer_class="MyTokenizer",
    )
    change(folder / "config.json", model_type="mine", auto_map=MAPS)
    change(folder / "processor_config.json", auto_map={"AutoProcessor": "mine.P"})
    change(folder / "generation_config.json", custom_generate=str(folder))
    program = "from penstock.offload.cli import main; main()"
    arguments = ["score", str(folder), "-", "-o", "-", "--set", "device_memory=1MiB"]
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        input=b"y\n" * 10_000,
        capture_output=True,
        env=environment,
        timeout=280,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == b""
    assert b"[y/N]" not in done.stderr
    assert b"Traceback" not in done.stderr
    assert not mark.exists()


def test_another_way_to_complete_prompts_is_announced_and_not_run(
    folder: Path, mark: Path
) -> None:
    assert (folder / "custom_generate" / "generate.py").exists()
    with penstock.load(folder, SMALL) as model:
        said = penstock.statistics(model).fallbacks
        list(penstock.generate(model, [{"id": 1, "prompt": "hi"}], max_new_tokens=2))
    assert any("custom_generate/generate.py), which is not used" in s for s in said)
    assert not mark.exists()


def test_a_pickle_is_never_opened(folder: Path, mark: Path) -> None:
    content = f"cos\nsystem\n(S'touch {mark}'\ntR.".encode()
    for name in ("pytorch_model.bin", "tokenizer.pkl", "training_args.bin", "x.pt"):
        (folder / name).write_bytes(content)
    with penstock.load(folder, SMALL) as model:
        list(penstock.score(model, [{"id": 1, "text": "import os"}]))
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="another format"):
        penstock.load(folder, SMALL)
    assert not mark.exists()
