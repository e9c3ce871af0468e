"""What `import penstock` gives: every name from one place, when it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import penstock

EXAMPLES = sorted((Path(penstock.__file__).parent / "examples").glob("*.py"))


def modules_imported_by(script: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_imports_from_penstock_itself_only(script: Path) -> None:
    ours = {
        name
        for name in modules_imported_by(script)
        if name.partition(".")[0] == "penstock"
    }
    assert ours <= {"penstock"}


def test_every_public_name_is_the_one_that_its_module_defines() -> None:
    assert set(penstock.__all__) == set(penstock._MODULE_OF)
    for name, module in penstock._MODULE_OF.items():
        found = getattr(penstock, name)
        assert found is getattr(import_module(f"penstock.{module}"), name)
        assert found.__module__ == f"penstock.{module}", f"{name} is not defined there"


def test_type_checkers_are_told_of_every_public_name() -> None:
    tree = ast.parse(Path(penstock.__file__).read_text())
    told = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told == penstock._MODULE_OF


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        penstock.lod  # noqa: B018


def test_importing_penstock_imports_neither_torch_nor_itself_further() -> None:
    code = (
        "import sys, penstock; "
        "print(*(m for m in sys.modules if m in ('torch', 'numpy', 'pydantic') "
        "or m.startswith('penstock.')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
