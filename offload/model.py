"""The Python API: a model whose weights are streamed, and sweeps over it."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from torch import nn

from ..io.checkpoint import open_checkpoint
from ..io.errors import PenstockError
from ..scheduler.sweep import Sweep
from .build import build
from .counters import Statistics
from .engine import Engine
from .life import Life
from .policy import Policy, cache_folder
from .settings.installed import check_installed

Model = TypeVar("Model", bound=nn.Module)

_ENGINE = "_penstock_engine"
_LIFE = "_penstock_life"


def load(path: str | Path, policy: Policy | None = None) -> Any:
    """The Hugging Face model in the folder `path`, its weights streamed from the
    safetensors files there (nothing is converted, nothing is written).

    It is the model object that transformers would give, in eval mode, for inference:
    call it, `generate` with it, or run a `sweep` over it. Close it with
    `penstock.unwrap(model)` or by `with penstock.load(...) as model:`.

    Raises CheckpointError, DoesNotFitError, MachineError, UsageError; each says what
    to do.
    """
    from .weights import hf  # transformers takes seconds to import

    policy = policy or Policy()
    check_installed(policy)
    checkpoint = open_checkpoint(path)
    skeleton = hf.build(checkpoint, policy.dtype)
    engine = build(skeleton.model, checkpoint, skeleton.recipes, policy)
    return _attach(skeleton.model, engine)


def wrap(module: Model, policy: Policy | None = None) -> Model:
    """Streams a module that is already built: its parameters are written once to a
    safetensors file in the cache folder and read from there. The module is changed in
    place and returned; `penstock.unwrap(module)` puts its parameters back and removes
    that file.
    """
    from .weights.spill import spill

    if _ENGINE in module.__dict__:
        raise PenstockError("this module is streamed already: unwrap it first")
    policy = policy or Policy()
    check_installed(policy)
    spilled = spill(module, policy.dtype, cache_folder(policy.io))
    try:
        engine = build(module, spilled.checkpoint, spilled.recipes, policy)
    except BaseException:
        spilled.restore(module)
        raise
    module.__dict__["_penstock_spill"] = spilled
    return _attach(module, engine, spilled.folder.cleanup)


def sweep(
    model: nn.Module,
    *,
    width: int | None = None,
    seed: int | None = None,
    coalesce: bool | None = None,
) -> Sweep:
    """A sweep over a streamed model: `with penstock.sweep(model) as s: s.map(fn, xs)`.

    `width`: most micro-batches in flight (None: as many as activation_memory allows).
    `seed`: micro-batch i samples as after `torch.manual_seed(seed + i)`.
    `coalesce`: whether products of few rows are made once for all micro-batches, which
    may change the last bits (None: as the policy says).
    """
    return engine_of(model).sweep(width, seed, coalesce=coalesce)


def statistics(model: nn.Module) -> Statistics:
    """What the streamed `model` has done so far."""
    return engine_of(model).statistics()


def unwrap(model: Model) -> Model:
    """Stops streaming: hooks, threads, descriptors and memory are given back.

    A module given to `wrap` has its parameters again. A model from `load` is closed:
    its weights were never in memory; use `load` again, or transformers.

    A model that is dropped is closed by the garbage collector. In a child that was
    forked this raises PenstockError, and the parent's model goes on.
    """
    engine = model.__dict__.get(_ENGINE)
    if engine is None:
        raise PenstockError("this model is not streamed by penstock (or was unwrapped)")
    engine.home.check()
    del model.__dict__[_ENGINE]
    model.__dict__.pop(_LIFE).detach()
    engine.close()
    model.__class__ = type(model).__mro__[1]
    spilled = model.__dict__.pop("_penstock_spill", None)
    if spilled is not None:
        spilled.restore(model)
    return model


def engine_of(model: nn.Module) -> Engine:
    """The engine that streams `model`; PenstockError if there is none."""
    engine = model.__dict__.get(_ENGINE)
    if not isinstance(engine, Engine):
        raise PenstockError(
            "this model is not streamed: get it from penstock.load or penstock.wrap"
        )
    engine.home.check()
    return engine


def _attach(model: Model, engine: Engine, *closers: Callable[[], None]) -> Model:
    """Ties the life of the engine, and of what `closers` close after it, to the model,
    and makes `with model:` close it. Special
    methods are looked up on the class, so the model gets one of its own, by the same
    name."""
    kind = type(model)

    def enter(self: Any) -> Any:
        return self

    def leave(
        self: Any,
        error_kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        engine = self.__dict__.get(_ENGINE)
        if engine is not None and engine.home.is_here:
            unwrap(self)

    namespace = {
        "__enter__": enter,
        "__exit__": leave,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    model.__class__ = type(kind.__name__, (kind,), namespace)
    model.__dict__[_ENGINE] = engine
    model.__dict__[_LIFE] = Life(model, (*engine.closers, *closers), engine.home)
    return model
