"""A model is named by its folder, or by an id whose files are in the hub's cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

import penstock
import zoo
from penstock.io.errors import CheckpointError
from penstock.offload.configs.checkpoint_folder import checkpoint_folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, which is empty."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    return folder


def downloaded(cache: Path, name: str, *commits: str, main: str | None = None) -> Path:
    """The folder of a repository with these snapshots."""
    repository = cache / f"models--{name.replace('/', '--')}"
    for commit in commits:
        (repository / "snapshots" / commit).mkdir(parents=True)
    if main is not None:
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(main)
    return repository


def test_an_id_is_the_snapshot_of_main(cache: Path) -> None:
    repository = downloaded(cache, "org/name", "aa", "bb", main="bb")
    assert checkpoint_folder("org/name") == repository / "snapshots" / "bb"
    assert checkpoint_folder(repository) == repository / "snapshots" / "bb"


def test_an_id_may_have_no_organisation(cache: Path) -> None:
    repository = downloaded(cache, "gpt2", "aa", main="aa")
    assert checkpoint_folder("gpt2") == repository / "snapshots" / "aa"


def test_the_only_snapshot_is_taken_if_no_branch_was_downloaded(cache: Path) -> None:
    repository = downloaded(cache, "org/name", "aa")
    assert checkpoint_folder("org/name") == repository / "snapshots" / "aa"


@pytest.mark.parametrize("main", [None, "cc", "", "../snapshots/aa", "\0"])
def test_of_several_snapshots_none_is_guessed(main: str | None, cache: Path) -> None:
    repository = downloaded(cache, "org/name", "aa", "bb", main=main)
    for name in ("org/name", repository):
        with pytest.raises(CheckpointError, match="2 snapshots, and none of them"):
            checkpoint_folder(name)


def test_a_folder_wins_over_an_id(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloaded(cache, "org/name", "aa", main="aa")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert checkpoint_folder("org/name") == Path("org/name")


def test_the_home_folder_has_a_short_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert checkpoint_folder("~/model") == tmp_path / "model"
    with pytest.raises(CheckpointError, match="~nobody-of-this-name/x"):
        checkpoint_folder("~nobody-of-this-name/x")


@pytest.mark.parametrize("name", ["org/name", "nowhere", "a.b_c-d/e"])
def test_what_was_not_downloaded_is_said_with_what_would(
    name: str, cache: Path
) -> None:
    with pytest.raises(CheckpointError, match=f"hf download {name}"):
        checkpoint_folder(name)


@pytest.mark.parametrize("name", ["a b", "a/b/c", "a--b", "..", "x" * 300, "", "a\0b"])
def test_what_is_no_id_is_one_sentence(name: str, cache: Path) -> None:
    if name == "..":
        assert checkpoint_folder(name) == Path("..")
        return
    with pytest.raises(CheckpointError, match="nor an id of the hub") as caught:
        checkpoint_folder(name)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "../nowhere"])
def test_a_path_is_no_id(name: str, cache: Path) -> None:
    assert checkpoint_folder(name) == Path(name)
    with pytest.raises(CheckpointError, match="is not a folder"):
        penstock.load(name)


def test_a_model_is_loaded_by_its_id(cache: Path, tmp_path: Path) -> None:
    zoo.save_checkpoint("llama", tmp_path / "saved")
    repository = downloaded(cache, "org/llama", main="aa")
    shutil.copytree(tmp_path / "saved", repository / "snapshots" / "aa")
    resident = zoo.load("llama", tmp_path / "saved")
    ids = torch.tensor([[1, 2, 3, 4]])
    with penstock.load("org/llama") as model, torch.inference_mode():
        assert torch.equal(model(ids).logits, resident(ids).logits)
