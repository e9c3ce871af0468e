"""README and docs: links lead somewhere, commands and policies are ones that exist, and
the Python of the README runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
import yaml

import penstock
from checkpoint import make_checkpoint
from penstock.offload.cli import app

ROOT = Path(penstock.__file__).parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)


def blocks(page: Path, language: str) -> list[str]:
    """The blocks of code on the page that are said to be in this language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S)
    return [code for name, code in found if name == language]


def commands() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for block in blocks(page, ""):
            for line in block.splitlines():
                if line.startswith("penstock ") and "  #" not in line[:12]:
                    yield page.name, line
    for name in re.findall(r"^\| `(penstock [^`]+)`", PAGES[0].read_text(), re.M):
        yield PAGES[0].name, name


@pages
def test_every_link_of_a_page_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_leads_to_every_page_of_docs() -> None:
    linked = re.findall(r"\]\((docs/[^)]+)\)", (ROOT / "README.md").read_text())
    assert set(linked) == {f"docs/{page.name}" for page in (ROOT / "docs").iterdir()}


@pytest.mark.parametrize(("page", "line"), list(commands()))
def test_every_command_of_a_page_is_one(
    page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("MODEL", "ORIGINAL"):  # else they would be ids of the hub
        Path(name).mkdir()
    group = typer.main.get_group(app)
    _, name, *words = shlex.split(line, comments=True)
    assert name in group.commands, f"{page}: {line}"
    group.commands[name].make_context(name, words)  # raises what the user would see


def test_every_command_is_in_the_readmes_table() -> None:
    group = typer.main.get_group(app)
    named = re.findall(r"^\| `penstock (\w+)", PAGES[0].read_text(), re.M)
    assert sorted(named) == sorted(group.commands)


@pages
def test_every_policy_of_a_page_is_one(page: Path) -> None:
    for text in blocks(page, "yaml"):
        policy = penstock.Policy(**yaml.safe_load(text))
        assert policy.model_fields_set


@pytest.mark.slow
def test_the_python_of_the_readme_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = blocks(ROOT / "README.md", "python")
    model = make_checkpoint(tmp_path / "tiny", "tiny", dtype="float32")
    exec(
        compile(code.replace("path/to/checkpoint", str(model)), "README.md", "exec"), {}
    )
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in said[:2]] == ["'a',", "'b',"]
    assert "'disk':" in said[2]
