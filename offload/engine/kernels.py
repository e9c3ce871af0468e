"""Chooses the loops that decode weights."""

from collections.abc import Iterable

from ...io.codecs.kernels import Kernels
from ...io.codecs.opening import open_kernels
from ...io.codecs.tiles import TILES
from ...io.fallbacks import Fallbacks
from ...io.weights.layout import Layout
from ..policy import IO, cache_folder


def kernels_for(layouts: Iterable[Layout], io: IO, fallbacks: Fallbacks) -> Kernels:
    """The kernels for the codecs of `layouts`, if any uses them: see `open_kernels`."""
    if any(plan.uses_kernels for plan in layouts):
        return open_kernels(cache_folder(io), fallbacks, "quantised weights")
    return TILES
