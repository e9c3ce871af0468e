"""Chooses the kernels of the CPU."""

from pathlib import Path

from ..fallbacks import Fallbacks
from .compiled import CannotCompileError, compiled
from .kernels import Kernels
from .tiles import TILES


def open_kernels(folder: Path, fallbacks: Fallbacks, decoded: str) -> Kernels:
    """The compiled kernels, kept below `folder`; else those in torch. Then `fallbacks`
    is told what is `decoded` by them ("quantised weights", say)."""
    try:
        return compiled(folder / "compiled")
    except CannotCompileError as error:
        fallbacks.announce(
            f"{decoded} are decoded by torch, which takes several times as long as "
            f"compiled code: {error}"
        )
        return TILES
