"""The Python API: a model whose weights are streamed, and sweeps over it."""

import operator
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from ..io.errors import PenstockError, UsageError
from ..io.sharing.ring import Seat
from ..io.user_errors import user_errors
from ..scheduler.ranks.post import Post
from ..scheduler.sweep.sweep import Sweep
from .adapters import adapt
from .configs.checkpoint_folder import checkpoint_folder
from .configs.opening import open_model
from .engine.build import build
from .engine.counters import Statistics
from .engine.engine import Engine
from .engine.life import Life
from .engine.ranking import build_shared
from .engine.refusals import check_decompressed, check_not_compiled, refusals
from .policy import Policy, cache_folder
from .settings.installed import check_installed
from .settings.memory_budget import Use
from .settings.room import coming_with, room_for
from .startup import rare_collections

Model = TypeVar("Model", bound=nn.Module)

_ENGINE = "_penstock_engine"
_LIFE = "_penstock_life"
_SPILL = "_penstock_spill"
_KIND = "_penstock_kind"


@user_errors()
def load(
    path: str | Path,
    policy: Policy | Mapping[str, Any] | None = None,
    *,
    adapter: str | Path | None = None,
    ranks: Literal["pipeline", "gather", "tensor"] | None = None,
) -> Any:
    """Loads the Hugging Face model in the folder `path` and streams its weights.

    `path` may also be the id of a model whose files are in the hub's cache: "org/name".

    The weights are read from the safetensors files there; nothing is converted or
    written. `policy` may be a dict of its keys. Python code that comes with the
    checkpoint runs only if the policy sets `trust_remote_code`. PEFT applies the
    adapter in the folder `adapter` (by default the policy's). With `ranks` (by default
    the policy's), the processes that torchrun has started share the model: all of them
    run the same program.

    Returns the model object that transformers would return, in eval mode, for
    inference: call it, call its `generate`, or run a `sweep` over it. It computes in
    the policy's dtype; the default is the checkpoint's, as with `from_pretrained(path,
    dtype="auto")`. On a CPU without instructions for bfloat16,
    `Policy(dtype="float32")` is several times as fast (jobs choose it themselves).
    Close the model with `penstock.unwrap(model)` or `with penstock.load(...) as
    model:`.

    Raises CheckpointError, DoesNotFitError, MachineError or UsageError; each says what
    to do.
    """
    policy = Policy.of(policy)
    if adapter is not None:
        policy = policy.model_copy(update={"adapter": Path(adapter)})
    if ranks is not None:
        policy = policy.with_settings([f"ranks={ranks}"])
    return load_for("any", path, policy)


def load_for(
    use: Use,
    path: str | Path,
    policy: Policy,
    post: Post | None = None,
    seat: Seat | None = None,
) -> Any:
    """Like `load`, for a `use`, which decides how memory is divided. Ranks share the
    model by `post`, which is closed with it; workers share reads by a `seat`."""
    path = checkpoint_folder(path)
    with rare_collections():
        from .weights import hf  # transformers takes seconds to import

        check_installed(policy)
        checkpoint = open_model(path, cache_folder(policy.io))
        with torch.device("cpu"):  # the policy chooses the device, not torch's default
            skeleton = hf.build(
                checkpoint, policy.dtype, trust_remote_code=policy.trust_remote_code
            )
        parts = skeleton.model, checkpoint, skeleton.recipes, policy
        room = room_for(policy, coming_with(path))
        if post is not None or policy.ranks is not None:
            engine = build_shared(*parts, room=room, use=use, post=post)
        else:
            engine = build(*parts, room=room, use=use, seat=seat)
    model = _attach(skeleton.model, engine)
    try:
        exchange = engine.exchange
        blocks = None if exchange is None else exchange.blocks
        adapt(model, policy, path, engine.fallbacks.announce, blocks)
        for note in skeleton.notes:
            engine.fallbacks.announce(note)
    except BaseException:
        unwrap(model)
        raise
    return model


@user_errors()
def wrap(module: Model, policy: Policy | Mapping[str, Any] | None = None) -> Model:
    """Streams a module that is already built.

    Its parameters are written once to a safetensors file in the cache folder, and read
    from there. The module is changed in place and returned. `penstock.unwrap(module)`
    restores its parameters and removes that file.

    Raises UsageError if `module` is not a module, PenstockError if it is streamed
    already, DoesNotFitError and MachineError if there is too little memory.
    """
    from .weights.spill import spill

    if not isinstance(module, nn.Module):
        raise UsageError(f"{module!r:.100} is not a torch.nn.Module: load it first")
    if _ENGINE in module.__dict__:
        raise PenstockError("this module is streamed already: unwrap it first")
    check_not_compiled(module)
    check_decompressed(module)
    policy = Policy.of(policy)
    check_installed(policy)
    spilled = spill(module, policy.dtype, cache_folder(policy.io))
    try:
        room = room_for(policy)
        engine = build(module, spilled.checkpoint, spilled.recipes, policy, room=room)
        module.__dict__[_SPILL] = spilled
        if spilled.strides:
            engine.fallbacks.announce(
                f"{len(spilled.strides)} weights, such as {min(spilled.strides)!r}, "
                "are not contiguous (channels_last, transposed): they are streamed as "
                "contiguous ones, which may change the last bits of products"
            )
        return _attach(module, engine, spilled.folder.cleanup)
    except BaseException:
        if _ENGINE in module.__dict__:
            unwrap(module)
        else:
            module.__dict__.pop(_SPILL, None)
            spilled.restore(module)
        raise


def sweep(
    model: nn.Module,
    *,
    width: int | None = None,
    seed: int | None = None,
    coalesce: bool | None = None,
) -> Sweep:
    """A sweep over a streamed model: `with penstock.sweep(model) as s: s.map(fn, xs)`.

    `width` is the most micro-batches in flight (None: as many as `activation_memory`
    allows). With `seed`, micro-batch i samples as after `torch.manual_seed(seed + i)`.
    `coalesce` says whether matrix products of few rows are made once for all
    micro-batches, which may change the last bits (None: as the policy says). Raises
    UsageError for numbers that are out of range.
    """
    _check_whole("width", width, 1, sys.maxsize)
    _check_whole("seed", seed, -(2**62), 2**62)
    return engine_of(model).sweep(width, seed, coalesce=coalesce)


def _check_whole(name: str, value: int | None, least: int, most: int) -> None:
    """Raises UsageError if `value` is not a whole number from `least` to `most`, or
    None."""
    if value is None:
        return
    if not hasattr(value, "__index__") or not least <= operator.index(value) <= most:
        raise UsageError(
            f"the {name} of a sweep is a whole number, at least {least} and at most "
            f"{most}, or None; not {value!r:.40}"
        )


def update(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Changes weights of the streamed `model`.

    The next forward computes with `tensors`, by their names in
    `model.named_parameters()` (any name of a tied weight). Shapes must be equal; a
    floating dtype is cast to that of the working set. Streamed weights are written to a
    file in the cache folder (`io.cache`), which takes as many bytes as they have until
    the model is closed.

    Either all weights are changed, or none and an error is raised: UsageError if a
    tensor does not fit, OutputError if there is no room for the file, PenstockError
    during a sweep or a forward. No other thread may be in a forward of the model.
    """
    engine_of(model).updates.apply(model, tensors)


def statistics(model: nn.Module) -> Statistics:
    """Counters of a streamed model since it was loaded, or raises PenstockError."""
    return engine_of(model).statistics()


def unwrap(model: Model) -> Model:
    """Stops streaming, and frees hooks, threads, files and memory.

    A module given to `wrap` gets its parameters back. A model from `load` is closed:
    its weights were never all in memory; call `load` again, or use transformers.

    A model that is dropped is closed by the garbage collector. Raises PenstockError if
    the model is not streamed, and in a forked child; the parent's model goes on then.
    """
    engine = getattr(model, "__dict__", {}).get(_ENGINE)
    if engine is None:
        raise PenstockError("this model is not streamed by penstock (or was unwrapped)")
    engine.fork_guard.check()
    spilled = model.__dict__.get(_SPILL)
    if spilled is not None and spilled.changed is None:
        updated = engine.updates.tensors()
        # A module keeps what was written to its weights.
        try:
            spilled.changed = updated | spilled.written(engine.resident, updated)
        except RuntimeError as error:
            if engine.device.type == "cpu":
                raise
            spilled.changed = updated  # the device has failed, and gives nothing back
            engine.fallbacks.announce(
                f"{engine.device} cannot be read any more ({error}): what was written "
                "to weights there since they were wrapped is lost"
            )
    engine.close()
    if spilled is not None:
        spilled.restore(model)
    # Until here it can be done again: an interrupt must not cost a module its weights.
    model.__class__ = getattr(type(model), _KIND, type(model))
    life = model.__dict__.pop(_LIFE, None)
    if life is not None:
        life.detach()
    for key in (_SPILL, _ENGINE):
        model.__dict__.pop(key, None)
    return model


def engine_of(model: nn.Module) -> Engine:
    """The engine of `model`, or of a model inside. Raises PenstockError if none is."""
    engine = getattr(model, "__dict__", {}).get(_ENGINE)
    if engine is None and isinstance(model, nn.Module):
        inner = (part.__dict__.get(_ENGINE) for part in model.modules())
        engine = next(filter(None, inner), None)
    if not isinstance(engine, Engine):
        raise PenstockError(
            "this model is not streamed: get it from penstock.load or penstock.wrap"
        )
    engine.fork_guard.check()
    return engine


def _attach(model: Model, engine: Engine, *closers: Callable[[], None]) -> Model:
    """Ties the engine to the life of the model, and makes `with model:` close it.

    `closers` are called after the engine's own when the model is garbage collected.
    Python looks up special methods on the class. So the model gets a class of its own,
    with the same name.
    """
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
        if engine is not None and not engine.fork_guard.is_forked:
            unwrap(self)

    namespace = {
        "__enter__": enter,
        "__exit__": leave,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        _KIND: kind,
        **refusals(kind),
    }
    model.__dict__[_ENGINE] = engine
    model.__class__ = type(kind.__name__, (kind,), namespace)
    model.__dict__[_LIFE] = Life(model, (*engine.closers, *closers), engine.fork_guard)
    return model
