"""Imports packages that only some files need."""

from importlib import import_module
from typing import Any

from ...io.errors import UsageError


def extra(module: str, package: str, what: str) -> Any:
    """Imports `module` of an optional `package`.

    Raises UsageError if it is not installed: `what` needs it, and how to install it.
    """
    try:
        return import_module(module)
    except ImportError:
        raise UsageError(
            f"{what} needs the package {package}: pip install {package}"
        ) from None
