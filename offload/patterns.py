"""Checks regular expressions of others, which a library will match without a time
limit."""

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from ..io.errors import CheckpointError

_SECONDS = 5.0
_MORE = 1_000
"""How many texts a file may have in addition to the names of modules."""
_SPECIAL = set("*+{?")
"""The characters that make an expression repeat. Without them, matching takes time only
in proportion to its length."""
_TRIAL = r"""
import json, re, sys, warnings
warnings.simplefilter("ignore")
expressions, names = json.load(sys.stdin)
for expression in expressions:
    for form in (r"{}$", r"(.*\.)?({})$", r"(^|.*\.){}($|\..*)"):
        try:
            found = re.compile(form.replace("{}", expression))
        except (re.error, RecursionError, OverflowError):
            continue
        for name in names:
            found.match(name)
"""
"""Runs in a separate process: nothing else can end a match that has begun."""


def check_patterns(source: str, values: Any, names: Iterable[str]) -> None:
    """Checks the expressions anywhere in `values`, the content of the file `source`.

    Raises CheckpointError if matching them with all of `names` takes too long, or if
    there are far more of them than names.
    """
    texts, names = set(_texts(values)), list(names)
    if len(texts) > len(names) + _MORE:
        raise CheckpointError(
            f"{source} names {len(texts):,} things, but the model has {len(names):,} "
            "modules: it is of another model"
        )
    expressions = sorted(text for text in texts if _SPECIAL & set(text))
    if not expressions:
        return
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TRIAL],
            input=json.dumps([expressions, names]).encode(),
            stderr=subprocess.DEVNULL,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        shown = ", ".join(f"{text!r:.100}" for text in expressions[:3])
        raise CheckpointError(
            f"{source}: matching {shown} with the names of the model's modules takes "
            f"more than {_SECONDS:g} s: write it without repetitions inside of "
            "repetitions, or as a list of names"
        ) from None


def _texts(values: Any) -> Iterator[str]:
    """All texts in `values`, at any depth, keys included."""
    open_ = [values]
    while open_:
        found = open_.pop()
        if isinstance(found, dict):
            open_ += [*found, *found.values()]
        elif isinstance(found, list):
            open_ += found
        elif isinstance(found, str):
            yield found
