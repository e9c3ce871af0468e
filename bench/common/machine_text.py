"""Text that every machine has: the documentation in Python's own modules and in the
packages that are installed."""

from __future__ import annotations

import ast
import importlib.util
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

HELD_OUT = 16
"""Every so many files go to what is held out."""
_LEAST_LETTERS = 80


def documentation(most_letters: int) -> tuple[list[str], list[str]]:
    """Docstrings, each once, of about `most_letters` letters: for training, and held
    out. No file gives to both. The same files always give the same."""
    seen: set[str] = set()
    training: list[str] = []
    held_out: list[str] = []
    left = most_letters
    for number, path in enumerate(_sources()):
        kept = held_out if number % HELD_OUT == 0 else training
        for text in _docstrings(path):
            if text not in seen:
                seen.add(text)
                kept.append(text)
                left -= len(text)
        if left <= 0:
            break
    return training, held_out


def _sources() -> Iterator[Path]:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    own = (p for p in stdlib.rglob("*.py") if "site-packages" not in p.parts)
    yield from sorted(path for path in own if "test" not in path.parts)
    for package in ("torch", "transformers"):
        found = importlib.util.find_spec(package)
        for folder in (found and found.submodule_search_locations) or ():
            yield from sorted(Path(folder).rglob("*.py"))


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in somebody's strings
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, kinds) else None
        if text is not None and len(text) >= _LEAST_LETTERS:
            yield text
