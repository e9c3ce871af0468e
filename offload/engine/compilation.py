"""Compiles the forward of streamed blocks: one graph for all blocks that are alike.

CUDA graphs are not used. A captured graph replays kernels on the addresses of its
capture, but a unit lies at another offset of the arena in another pass. The replay
would silently compute with another unit's weights. Here parameters are inputs of the
graphs; guards check their shapes, not their addresses.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch._dynamo
from torch import nn
from torch._C._dynamo.eval_frame import (
    _FrameAction,
    _FrameExecStrategy,
    set_code_exec_strategy,
)

from ..units.sites import ModelDivision
from ..weights.placeholder import StreamedParameter

Note = Callable[[str], None]

_OURS = "_kept_out"
"""Part of the name of functions that are kept out of graphs on purpose."""


def compile_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """Compiles `graph` with inductor. Random numbers are the same as in eager mode."""
    from torch._inductor.compile_fx import compile_fx

    options = {"triton.cudagraphs": False, "fallback_random": True}
    compiled: Any = compile_fx(graph, inputs, config_patches=options)
    return cast(Callable[..., Any], compiled)


class Compilation:
    """Gives a compiled forward to each site that contains no other site.

    It replaces `module.forward` on the instance, so hooks stay outside compiled code.
    This matters because hooks switch between micro-batches, and a switch inside
    compiled code would mix up dynamo's thread-local state. `stop` restores every
    forward; one that user code has wrapped meanwhile runs eagerly from then on.

    Sites of the same class and shapes share one compiled function, which takes the
    module as an argument. Each engine has functions of its own, so engines do not use
    up each other's recompile limit of dynamo.
    """

    def __init__(self, model_division: ModelDivision) -> None:
        self._model_division = model_division
        self._kinds: dict[tuple[Any, ...], _Kind] = {}
        self._compiled: list[tuple[nn.Module, _Kind, Any]] = []

    def start(self, note: Note) -> None:
        """Replaces forwards. Nothing is compiled before the first call. `note` is
        called with a sentence for each site that cannot be compiled."""
        _skip_faults()
        sites = {id(site.module) for site in self._model_division.sites}
        for site in self._model_division.sites:
            module = site.module
            if any(id(part) in sites for part in module.modules() if part != module):
                continue
            if "forward" in vars(module):
                note(f"{site.name} is not compiled: its forward is not its class's own")
                continue
            key = _key(module)
            if key not in self._kinds:
                self._kinds[key] = _Kind(type(module).__name__, note)
            kind = self._kinds[key]
            forward = _forward(module, kind)
            module.forward = forward
            self._compiled.append((module, kind, forward))

    def stop(self) -> None:
        """Restores the forwards that `start` replaced. May be called repeatedly."""
        for module, kind, forward in self._compiled:
            kind.is_eager = True
            if vars(module).get("forward") is forward:
                del module.forward
        self._compiled.clear()
        self._kinds.clear()

    @staticmethod
    def keep_out(function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns `function` so wrapped that dynamo does not trace it. It may switch to
        another micro-batch, even inside a block that calls a site outside itself."""

        def _kept_out(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        disable: Any = torch.compiler.disable
        return cast(Callable[..., Any], disable(_kept_out))


class _Kind:
    """The blocks of one class and shape: one compiled function for all of them."""

    def __init__(self, name: str, note: Note) -> None:
        self.is_eager = False
        """Set when compiling has failed, and by `Compilation.stop`."""
        self._name = name
        self._note = note
        self._num_graphs = 0
        self._has_run = False

        def run(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return type(module).forward(module, *args, **kwargs)

        # A new code object: dynamo's cache and recompile limit are per code object.
        run.__code__ = run.__code__.replace()
        self._run = torch.compile(run, backend=self._build)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self.is_eager and torch.is_grad_enabled():
            self._note(
                f"{self._name} runs eagerly where gradients are recorded: call the "
                "model in torch.inference_mode()"
            )
        if self.is_eager or torch.is_grad_enabled():
            return type(module).forward(module, *args, **kwargs)
        before = _Counts()
        self._has_run = False
        try:
            with _settings(), _caches_apart((*args, *kwargs.values()), self._enter):
                output = self._run(module, args, kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            self._give_up(_first_line(error))
            if self._has_run:  # a second run would, e.g., update a cache twice
                raise
            return type(module).forward(module, *args, **kwargs)
        if self._num_graphs == 0:
            self._give_up(before.reason() or "it has nothing to compile")
        elif before.has_failed():
            self._note(
                f"{self._name} runs eagerly in part or for some calls: "
                + (before.reason() or "TORCH_LOGS=graph_breaks,recompiles tells why")
            )
        return output

    def _build(
        self, graph: torch.fx.GraphModule, inputs: list[Any]
    ) -> Callable[..., Any]:
        """Compiles one graph. If that fails, the graph runs uncompiled."""
        self._num_graphs += 1
        try:
            compiled = compile_graph(graph, inputs)
        except Exception as error:
            self._give_up(_first_line(error))
            compiled = graph.forward
        chosen: list[Callable[..., Any]] = []

        def run(*values: Any) -> Any:
            self._enter()
            if not chosen:  # dynamo's guards ensure the same choice for each call
                is_real = not any(isinstance(v, StreamedParameter) for v in values)
                chosen.append(compiled if is_real else graph.forward)
            return chosen[0](*values)

        return run

    def _enter(self) -> None:
        self._has_run = True

    def _give_up(self, reason: str) -> None:
        self.is_eager = True
        self._note(f"{self._name} is not compiled and runs eagerly: {reason}")


class _Counts:
    """A snapshot of dynamo's counters."""

    def __init__(self) -> None:
        counters = torch._dynamo.utils.counters
        self._failed = counters["frames"]["total"] - counters["frames"]["ok"]
        self._breaks = dict(counters["graph_break"])

    def has_failed(self) -> bool:
        return _Counts()._failed > self._failed

    def reason(self) -> str:
        """Why dynamo broke a graph since the snapshot; "" if it gives no reason."""
        counters = torch._dynamo.utils.counters["graph_break"]
        new = [
            why.partition("\n")[0]
            for why, num in counters.items()
            if num > self._breaks.get(why, 0) and _OURS not in why
        ]
        return new[-1] if new else ""


def _key(module: nn.Module) -> tuple[Any, ...]:
    shapes = [(n, p.shape, p.dtype) for n, p in module.named_parameters()]
    return (type(module).forward, *shapes)


def _forward(module: nn.Module, kind: _Kind) -> Callable[..., Any]:
    @functools.wraps(module.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return kind(module, args, kwargs)

    return forward


@contextmanager
def _settings() -> Iterator[None]:
    """Sets dynamo's options while a block runs. Code that it cannot compile runs
    eagerly. After a graph break in an inner module it continues inside that module, so
    that a block becomes two graphs only."""
    settings = {"suppress_errors": True, "fail_on_recompile_limit_hit": False}
    if hasattr(torch._dynamo.config, "nested_graph_breaks"):
        settings["nested_graph_breaks"] = True
    with torch._dynamo.config.patch(settings):
        yield


@contextmanager
def _caches_apart(values: Iterable[Any], entered: Callable[[], None]) -> Iterator[None]:
    """Keeps the updates of transformers' caches among `values` out of the graphs. They
    depend on the layer's number, so each layer would need a graph of its own."""
    caches = [cache for value in values for cache in _caches_in(value)]
    for cache in caches:
        vars(cache)["update"] = _apart(cache.update, entered)
    try:
        yield
    finally:
        for cache in caches:
            del vars(cache)["update"]


def _caches_in(value: Any) -> list[Any]:
    """The caches in `value`: itself, and the caches of encoder and decoder in it."""
    module = sys.modules.get("transformers.cache_utils")
    if module is None or not isinstance(value, module.Cache):
        return []
    inner = [v for v in vars(value).values() if isinstance(v, module.Cache)]
    return [cache for cache in (value, *inner) if "update" not in vars(cache)]


def _apart(update: Callable[..., Any], entered: Callable[[], None]) -> Any:
    def entering(*args: Any, **kwargs: Any) -> Any:
        entered()
        return update(*args, **kwargs)

    return Compilation.keep_out(entering)


def _skip_faults() -> None:
    """Makes dynamo skip `StreamedParameter.__torch_dispatch__`, which reads files."""
    dispatch: Any = StreamedParameter.__torch_dispatch__
    skip = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
    set_code_exec_strategy(dispatch.__func__.__code__, skip)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
