"""Finds out what a transformers model keeps of each token, by running a few tokens
through it on meta: nothing is derived from its config.

The model's own forward makes its own cache. Modules that cannot run on meta, such as
experts that are chosen by values, answer with their input. Of blocks that are alike
only the first one runs, and stands for the others.
"""

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .alike_blocks import alike_blocks
from .cache_contents import Kept, loose_in, nbytes_of, sizes_of, tensors_in
from .cache_watch import CacheWatch, NotTracedError
from .meta_twin import meta_twin
from .on_meta import OnMeta

_TOKENS = 2
"""Tokens of the first call. The second one has one more."""
_FAILURES = (
    RuntimeError,  # NotImplementedError, too
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
)
"""What modules raise that do not run on meta."""
_CACHES = ("past_key_values", "cache_params", "state", "mems")
"""What transformers' models call a cache, in their outputs and arguments."""


@dataclass(frozen=True, slots=True)
class CacheTrace:
    """What the modules of a model keep, by their names."""

    kept: Mapping[str, Kept]
    state_bytes: int
    """Bytes of a sequence that no single module keeps."""
    ran: frozenset[str] | None
    """The modules that ran for text; None: all count as if they had."""


def trace_cache(model: Any) -> CacheTrace:
    """Traces the cache of `model`, a transformers model that may be streamed or on
    meta. Raises NotTracedError where that is impossible."""
    problem: Exception | None = None
    for skips, has_positions in itertools.product((True, False), (False, True)):
        run = _Run(model, skips=skips)
        try:
            return run.trace(has_positions=has_positions)
        except Exception as error:
            problem = problem or run.problem or error
    words = " ".join(str(problem).split())
    raise NotTracedError(f"{type(problem).__name__}: {words[:160]}") from problem


def results_of(model: Any) -> Mapping[str, Any]:
    """What the modules of `model` return for a few tokens, as tensors on meta, by their
    names. Those that cannot run there are left out."""
    for has_positions in (False, True):
        run = _Run(model, skips=True)
        with contextlib.suppress(Exception):
            run.trace(has_positions=has_positions)
            return {
                name: run._results[name]
                for name in run._results.keys() - run.failed
                if run._alike.get(name) not in run.failed
            }
    return {}


class _Run:
    """The calls of one model's twin."""

    def __init__(self, model: Any, *, skips: bool) -> None:
        self._model: Any = meta_twin(model)
        self._names = {id(m): n for n, m in self._model.named_modules()}
        self._alike = alike_blocks(self._model) if skips else {}
        self._watch = CacheWatch(self._alike)
        self._ran: set[str] = set()
        self._covered: set[str] = set()
        """Modules that answered with their input, or for which another one ran."""
        self._results: dict[str, Any] = {}
        self.failed: set[str] = set()
        """Modules that answered with their input."""
        self.problem: Exception | None = None
        """The first reason why a module did not run."""

    def trace(self, *, has_positions: bool) -> CacheTrace:
        watch = self._watch
        for name, module in self._model.named_modules():
            if name:
                module.__dict__["forward"] = self._guarded(name, module)
        is_seq2seq = bool(self._model.config.is_encoder_decoder)
        with torch.no_grad(), OnMeta(watch):
            first = self._call(_TOKENS, {}, has_positions)
            caches = {n: v for n in _CACHES if (v := _get(first, n)) is not None}
            if not caches and watch.seen_cache is not None:
                caches = {_CACHES[0]: watch.seen_cache}
            before = {key: sizes_of(layer) for key, layer in watch.layers(caches)}
            watch.context = _TOKENS + 1
            second = self._call(1, caches, has_positions)
        layers = dict(watch.layers(caches))
        watch.check(layers, self._ran)
        kept = watch.kept(layers, before, _TOKENS, self._ran)
        old = [t for n, v in caches.items() for t in loose_in(n, v, watch.cache_class)]
        new = [
            t for n in caches for t in loose_in(n, _get(second, n), watch.cache_class)
        ]
        grown = sum(t.numel() for t in new) - sum(t.numel() for t in old)
        if grown > 0:
            kept[""] = Kept(own_per_token=grown)
        loose = 0 if grown > 0 else sum(map(nbytes_of, old))
        ran = None if is_seq2seq else self._all_that_ran()
        return CacheTrace(kept, loose, ran)

    def _call(self, num: int, caches: Mapping[str, Any], has_positions: bool) -> Any:
        model = self._model
        known = inspect.signature(type(model).forward).parameters
        past = _TOKENS if caches else 0
        ids = torch.ones((1, num), dtype=torch.long)
        given: dict[str, Any] = {"use_cache": True, "return_dict": True, **caches}
        if model.config.is_encoder_decoder:
            given["decoder_input_ids"] = ids
            if model.main_input_name == "input_ids":
                given["input_ids"] = torch.ones((1, _TOKENS), dtype=torch.long)
            else:
                given["encoder_outputs"] = self._encoded()
        else:
            given["input_ids"] = ids
        if has_positions:
            given["position_ids"] = torch.arange(past, past + num)[None]
        return model(**{k: v for k, v in given.items() if k in known})

    def _encoded(self) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        config = self._model.config
        decoder = config.get_text_config(decoder=True)
        hidden = getattr(config, "hidden_size", None) or decoder.hidden_size
        dtype = next(self._model.parameters()).dtype
        states = torch.empty((1, _TOKENS, hidden), dtype=dtype, device="meta")
        return BaseModelOutput(last_hidden_state=states)

    def _guarded(self, name: str, module: nn.Module) -> Callable[..., Any]:
        """The forward of `module`, which answers with its input where it fails."""
        forward, watch = type(module).forward, self._watch
        first = self._alike.get(name)

        def run(*args: Any, **kwargs: Any) -> Any:
            for value in (*args, *kwargs.values()):
                if isinstance(value, watch.cache_class):
                    watch.watch(value)
            self._ran.add(name)
            if first is not None and first in self._results:
                self._covered.add(name)
                self._results[name] = self._results[first]
                return self._results[first]
            watch.stack.append(name)
            try:
                result = forward(module, *args, **kwargs)
            except _FAILURES as error:
                self.problem = self.problem or error
                self._covered.add(name)
                self.failed.add(name)
                result = next(tensors_in((args, kwargs)), None)
                if result is None:
                    raise
            finally:
                watch.stack.pop()
            self._results[name] = result
            return result

        return run

    def _all_that_ran(self) -> frozenset[str]:
        """The modules that ran, and those inside of others that stood for them."""
        return frozenset(
            name
            for name in self._names.values()
            if name in self._ran or any(up in self._covered for up in _above(name))
        )


def _above(name: str) -> Iterator[str]:
    """The names of the modules around the module `name`."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _get(result: Any, name: str) -> Any:
    return result.get(name) if isinstance(result, Mapping) else None
