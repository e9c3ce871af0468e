"""Packages that only some files need."""

from importlib import import_module
from typing import Any

from ...io.errors import UsageError


def extra(module: str, package: str, what: str) -> Any:
    """The module, of an optional package. Raises UsageError that says how to get it:
    `what` needs it."""
    try:
        return import_module(module)
    except ImportError:
        raise UsageError(
            f"{what} needs the package {package}: pip install {package}"
        ) from None
