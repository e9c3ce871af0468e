"""How much is tried in flight, and in how large micro-batches."""

from collections.abc import Mapping

MICRO_BATCHES: Mapping[str, tuple[int, ...]] = {
    "tokens": (128, 256, 512, 1024, 2048),
    "sequences": (4, 8, 16, 32, 64),
}
"""The micro-batch sizes that are tried, by the unit that is in flight."""
OF_EXPERTS: Mapping[str, tuple[int, ...]] = {
    "tokens": (128, 512, 2048, 8192, 32768),
    "sequences": (4, 16, 64, 256),
}
"""Those of models with experts: each call reads the experts that are hit, and each of
them gets only a share of its rows."""
MOST_IN_FLIGHT: Mapping[str, int] = {"tokens": 2048 * 128, "sequences": 64 * 128}
WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128)
"""The numbers of micro-batches in flight that are tried."""
