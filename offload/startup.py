"""What makes a process start sooner, each for a span of its life."""

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

UNUSED = ("scipy", "sklearn")
"""Libraries that transformers imports wherever they are installed, for the losses of
object detection and for assisted generation, and that no command uses. scikit-learn
brings pandas and pyarrow with it."""

_RARELY = (100_000, 50, 100)


@contextmanager
def hidden(names: Sequence[str] = UNUSED) -> Iterator[None]:
    """Those of `names` that are not imported yet count as not installed meanwhile: for
    a process that is ours from beginning to end, as a command's is. Not where
    transformers has been imported before: it remembers what it has found installed, and
    imports that later."""
    is_late = "transformers" in sys.modules
    absent = [name for name in names if name not in sys.modules and not is_late]
    for name in absent:
        sys.modules[name] = None  # type: ignore[assignment]  # what Python defines
    try:
        yield
    finally:
        for name in absent:
            sys.modules.pop(name, None)


@contextmanager
def rare_collections() -> Iterator[None]:
    """Looks for garbage rarely meanwhile: what an import makes stays, and looking
    through all of it again and again is a good part of importing transformers."""
    usual = gc.get_threshold()
    gc.set_threshold(*_RARELY)
    try:
        yield
    finally:
        gc.set_threshold(*usual)
