"""Limits how much longer a tokenizer may make a text.

Its steps run in the library `tokenizers`, where nothing can stop them.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...io.errors import CheckpointError
from ...io.regular_file import read_json_object, read_whole

_MOST_BYTES = 256 << 20
MOST_GROWTH = 1_000
"""How many times longer all replacements of one kind of step may make a text. Real ones
make one letter three."""


def check_tokenizer(folder: Path) -> None:
    """Raises CheckpointError if the replacements in `tokenizer.json` together can make
    a short text gigabytes long."""
    path = folder / "tokenizer.json"
    if not path.exists() or b'"Replace"' not in read_whole(path, _MOST_BYTES):
        return
    values = read_json_object(path, _MOST_BYTES)
    for kind in ("normalizer", "pre_tokenizer", "decoder"):
        growth = 1.0
        for step in _steps(values.get(kind)):
            growth *= _growth_of(step)
            if growth > MOST_GROWTH:
                raise CheckpointError(
                    f"{path}: the replacements of its {kind} make a text more than "
                    f"{MOST_GROWTH:,} times as long, which no tokenizer needs: take "
                    "some out"
                )


def _steps(value: Any) -> Iterator[Mapping[str, Any]]:
    """The replacement steps in `value`, at any depth."""
    left = [value]
    while left:
        found = left.pop()
        if isinstance(found, list):
            left += reversed(found)
        elif isinstance(found, dict):
            if found.get("type") == "Replace":
                yield found
            left += [inside for inside in found.values() if isinstance(inside, list)]


def _growth_of(step: Mapping[str, Any]) -> float:
    """The most letters by which the step replaces one."""
    content, pattern = step.get("content"), step.get("pattern")
    text = pattern.get("String") if isinstance(pattern, dict) else None
    num = len(text) if isinstance(text, str) else 1  # a match of a regex may be short
    return max(1.0, len(content) / max(num, 1)) if isinstance(content, str) else 1.0
