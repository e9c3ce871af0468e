"""Chooses the loops that decode quantised weights."""

from collections.abc import Iterable

from ...io.codecs.compiled import CannotCompileError, compiled
from ...io.codecs.kernels import Kernels
from ...io.codecs.lossless import Lossless
from ...io.codecs.scaled import Scaled
from ...io.codecs.tiles import TILES
from ...io.fallbacks import Fallbacks
from ...io.weights.layout import Layout
from ..policy import IO, cache_folder


def open_kernels(layouts: Iterable[Layout], io: IO, fallbacks: Fallbacks) -> Kernels:
    """The kernels for the codecs of `layouts`: compiled ones if these need them, kept
    in the cache folder of `io`; else those in torch, which `fallbacks` is told."""
    codecs = (each.codec for plan in layouts for each in plan.decodes)
    if not any(isinstance(codec, Scaled | Lossless) for codec in codecs):
        return TILES
    try:
        return compiled(cache_folder(io) / "compiled")
    except CannotCompileError as error:
        fallbacks.announce(
            f"quantised weights are decoded by torch, which takes several times as "
            f"long as compiled code: {error}"
        )
        return TILES
