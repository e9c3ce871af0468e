"""Regular expressions of others, which a library will match without a limit of time."""

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from ..io.errors import CheckpointError

_SECONDS = 5.0
_MORE = 1_000
"""Texts that a file may hold beside the names of modules."""
_SPECIAL = set("*+{?")
"""What an expression repeats by: without, it takes no longer than its length."""
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
"""A process of its own: nothing else ends a match that has begun."""


def check_patterns(source: str, values: Any, names: Iterable[str]) -> None:
    """Raises CheckpointError where an expression somewhere in `values`, which are those
    of the file `source`, takes too long to be matched with all of `names`, or there are
    more of them than could match anything else."""
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
    """All texts at any depth, keys among them."""
    open_ = [values]
    while open_:
        found = open_.pop()
        if isinstance(found, dict):
            open_ += [*found, *found.values()]
        elif isinstance(found, list):
            open_ += found
        elif isinstance(found, str):
            yield found
