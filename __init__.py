"""Penstock streams a model's weights through a small working set while many
micro-batches run through each layer that is there."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .io.errors import (
        CheckpointError,
        DoesNotFitError,
        InputError,
        MachineError,
        OutputError,
        PenstockError,
        RanksError,
        UsageError,
    )
    from .offload.engine.counters import Statistics
    from .offload.mapper import Mapper
    from .offload.model import load, statistics, sweep, unwrap, update, wrap
    from .offload.policy import Policy
    from .offload.tasks.classify import classify
    from .offload.tasks.embed import embed
    from .offload.tasks.generate import generate
    from .offload.tasks.score import score
    from .scheduler.sweep.sweep import Sweep

# Imported on first use: importing the package must cost nothing and touch nothing.
_MODULE_OF = {
    "CheckpointError": "io.errors",
    "DoesNotFitError": "io.errors",
    "InputError": "io.errors",
    "MachineError": "io.errors",
    "Mapper": "offload.mapper",
    "OutputError": "io.errors",
    "PenstockError": "io.errors",
    "Policy": "offload.policy",
    "RanksError": "io.errors",
    "Statistics": "offload.engine.counters",
    "Sweep": "scheduler.sweep.sweep",
    "UsageError": "io.errors",
    "classify": "offload.tasks.classify",
    "embed": "offload.tasks.embed",
    "generate": "offload.tasks.generate",
    "load": "offload.model",
    "score": "offload.tasks.score",
    "statistics": "offload.model",
    "sweep": "offload.model",
    "unwrap": "offload.model",
    "update": "offload.model",
    "wrap": "offload.model",
}

__all__ = [
    "CheckpointError",
    "DoesNotFitError",
    "InputError",
    "MachineError",
    "Mapper",
    "OutputError",
    "PenstockError",
    "Policy",
    "RanksError",
    "Statistics",
    "Sweep",
    "UsageError",
    "classify",
    "embed",
    "generate",
    "load",
    "score",
    "statistics",
    "sweep",
    "unwrap",
    "update",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
