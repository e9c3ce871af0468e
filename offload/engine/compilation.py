"""Compiles the forward of streamed blocks: one graph for all that are alike.

CUDA graphs are not used. A captured graph replays kernels on the addresses it saw, but
a unit stands at another offset of the arena on another pass, where meanwhile another
unit's bytes lie: the replay would compute with those, without an error. Parameters are
inputs of our graphs, and guards look at their shapes, never at where they are.
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
from ..weights.poison import StreamedParameter

Note = Callable[[str], None]

_OURS = "_kept_out"
"""In the name of what is never traced by our own wish."""


def compile_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """torch's own compiler. Random numbers are those of eager mode."""
    from torch._inductor.compile_fx import compile_fx

    options = {"triton.cudagraphs": False, "fallback_random": True}
    compiled: Any = compile_fx(graph, inputs, config_patches=options)
    return cast(Callable[..., Any], compiled)


class Compilation:
    """Puts a compiled forward into each site that has no other site inside.

    It replaces `module.forward` on the instance, not the module's call: hooks stay
    outside of compiled code, and with them the switch from one micro-batch to the next,
    which would take half of dynamo's thread-local state with it. `stop` takes every one
    out again; one that somebody else has wrapped meanwhile runs eagerly from then on.

    Sites whose class and shapes are the same share one compiled function, to which the
    module is an argument. Each engine has its own functions, and so its own share of
    dynamo's recompile limit.
    """

    def __init__(self, found: ModelDivision) -> None:
        self._found = found
        self._kinds: dict[tuple[Any, ...], _Kind] = {}
        self._compiled: list[tuple[nn.Module, _Kind, Any]] = []

    def start(self, note: Note) -> None:
        """Replaces forwards; nothing is compiled before the first call. `note` is told,
        once each, what cannot be compiled."""
        _skip_faults()
        sites = {id(site.module) for site in self._found.sites}
        for site in self._found.sites:
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
        """Puts back what `start` replaced. Harmless at any time, and twice."""
        for module, kind, forward in self._compiled:
            kind.is_eager = True
            if vars(module).get("forward") is forward:
                del module.forward
        self._compiled.clear()
        self._kinds.clear()

    @staticmethod
    def keep_out(function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, never traced: it may switch to another micro-batch, even inside
        of a block (one that calls a site which it does not contain)."""

        def _kept_out(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        disable: Any = torch.compiler.disable
        return cast(Callable[..., Any], disable(_kept_out))


class _Kind:
    """The blocks of one class and shape: one compiled function for all of them."""

    def __init__(self, name: str, note: Note) -> None:
        self.is_eager = False
        """Once it has turned out that it cannot be compiled, or is over."""
        self._name = name
        self._note = note
        self._num_graphs = 0
        self._has_run = False

        def run(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return type(module).forward(module, *args, **kwargs)

        # A code object of its own: dynamo keeps what it compiled, and counts, by that.
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
            if self._has_run:  # again would be twice, for a cache for one
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
        """Compiles one graph; runs it as it is where that fails."""
        self._num_graphs += 1
        try:
            compiled = compile_graph(graph, inputs)
        except Exception as error:
            self._give_up(_first_line(error))
            compiled = graph.forward
        chosen: list[Callable[..., Any]] = []

        def run(*values: Any) -> Any:
            self._enter()
            if not chosen:  # guards see to it that it is the same every time
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
    """What dynamo has counted so far."""

    def __init__(self) -> None:
        counters = torch._dynamo.utils.counters
        self._failed = counters["frames"]["total"] - counters["frames"]["ok"]
        self._breaks = dict(counters["graph_break"])

    def has_failed(self) -> bool:
        return _Counts()._failed > self._failed

    def reason(self) -> str:
        """Why dynamo left a frame since then, as far as it says."""
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
    """dynamo's settings while a block runs. What it fails at runs eagerly; after a
    break in an inner module it goes on there, so that a block stays two graphs."""
    settings = {"suppress_errors": True, "fail_on_recompile_limit_hit": False}
    if hasattr(torch._dynamo.config, "nested_graph_breaks"):
        settings["nested_graph_breaks"] = True
    with torch._dynamo.config.patch(settings):
        yield


@contextmanager
def _caches_apart(values: Iterable[Any], entered: Callable[[], None]) -> Iterator[None]:
    """Keeps the updates of transformers' caches among `values` out of the graphs. Each
    layer's would be traced for its own number: as many graphs as there are layers."""
    caches = [cache for value in values for cache in _caches_in(value)]
    for cache in caches:
        vars(cache)["update"] = _apart(cache.update, entered)
    try:
        yield
    finally:
        for cache in caches:
            del vars(cache)["update"]


def _caches_in(value: Any) -> list[Any]:
    """`value` if it is a cache, and those in it (of encoder and decoder)."""
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
    """A fault reads files: dynamo must not trace it, where it traces what is around."""
    dispatch: Any = StreamedParameter.__torch_dispatch__
    skip = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
    set_code_exec_strategy(dispatch.__func__.__code__, skip)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
