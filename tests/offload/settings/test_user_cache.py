"""The cache folder of a user who has one, and of one who has not."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

import pytest
from torch import nn

import penstock
from penstock import Policy
from penstock.offload.machines.machine import find_machine, own_machine_path
from penstock.offload.settings.user_cache import kept_file, user_cache


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files, and a user without any variable."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.delenv("XDG_CACHE_HOME")
    return folder


@pytest.fixture
def homeless(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As in a container that runs as a uid which /etc/passwd does not have."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    return temporary


@pytest.fixture
def blocked(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that nobody can make, not even root: a file is in its place."""
    place = temporary.parent / "file"
    place.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    return temporary


def test_without_a_home_a_temporary_folder_stands_in(homeless: Path) -> None:
    found = user_cache()
    assert found.path == homeless / f"penstock-{os.getuid()}"
    assert found.fallback is not None
    assert "no home folder" in found.fallback


def test_a_folder_that_cannot_be_made_is_named(blocked: Path) -> None:
    found = user_cache()
    assert found.path.is_relative_to(blocked)
    assert found.fallback is not None
    assert "cannot be written" in found.fallback


def test_the_folder_that_stands_in_is_not_somebody_elses(
    homeless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    (homeless / "penstock-12345").mkdir()
    assert user_cache().path != homeless / "penstock-12345"


def test_a_user_with_a_cache_folder_is_told_nothing(tmp_path: Path) -> None:
    assert user_cache().fallback is None


def test_what_was_measured_without_a_home_is_found_again(homeless: Path) -> None:
    assert find_machine(None) is None
    path = own_machine_path()
    path.parent.mkdir(parents=True)
    path.write_text("")
    assert kept_file("machine.yaml") == path


def test_a_module_is_wrapped_without_a_home_and_its_report_says_where(
    homeless: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = nn.Sequential(nn.Linear(8, 8))
    with caplog.at_level(logging.WARNING, "penstock"):
        wrapped = penstock.wrap(module, Policy(device_memory="1MiB"))
        try:
            said = [f for f in penstock.statistics(wrapped).fallbacks if "home" in f]
            assert len(list(homeless.glob("penstock-*/wrapped-*"))) == 1
        finally:
            penstock.unwrap(wrapped)
    assert len(said) == 1
    assert caplog.text.count("no home folder") == 1
