"""Refuses what cannot be done with a streamed model: its weights are not in memory."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...io.errors import PenstockError, UsageError
from ..weights.placeholder import cast_in_place


def refusals(kind: type[nn.Module]) -> dict[str, Any]:
    """Returns the methods of a class that a streamed model gets, derived from its own
    class `kind`. They raise PenstockError before anything is changed; the error says
    what to do instead."""

    def apply_to_all(
        self: nn.Module, change: Callable[..., Any], recurse: bool = True
    ) -> Any:
        for like in _kinds_of_tensors(self):
            probe = torch.empty(0, dtype=like.dtype, device=like.device)
            if change(probe) is not probe:
                raise cast_in_place()
        unchanged: Any = kind._apply
        return unchanged(self, change, recurse)

    def load_state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise UsageError(
            "the weights of a streamed model are those of its files: "
            "penstock.update(model, state) gives it others"
        )

    def resize(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise UsageError(
            "the embeddings of a streamed model cannot be resized: load the model with "
            "transformers, resize and save it, and load that with penstock"
        )

    def compile_it(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise _no_compiler()

    def seen_by_a_compiler(self: nn.Module) -> Any:
        """torch.compile reads this attribute first. Others get AttributeError."""
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("torch._dynamo"):
            raise _no_compiler()
        raise AttributeError("_torchdynamo_orig_callable")

    def copied(self: nn.Module, *args: Any) -> Any:
        raise UsageError(
            f"a streamed {kind.__name__} can be neither copied nor pickled, as its "
            "weights are not in memory: load or wrap another one (each process its "
            "own), or copy it after penstock.unwrap"
        )

    def shallow_copy(self: nn.Module) -> Any:
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def scripted(self: nn.Module) -> Any:
        raise _no_graph()

    methods: dict[str, Any] = {
        "__deepcopy__": copied,
        "__reduce_ex__": copied,
        "__copy__": getattr(kind, "__copy__", shallow_copy),
        "__prepare_scriptable__": scripted,
        "_apply": apply_to_all,
        "load_state_dict": load_state_dict,
        "compile": compile_it,
        "_torchdynamo_orig_callable": property(seen_by_a_compiler),
    }
    if hasattr(kind, "resize_token_embeddings"):
        methods["resize_token_embeddings"] = resize
    return methods


def check_not_compiled(module: nn.Module) -> None:
    """Raises UsageError if torch.compile has made or compiled `module`."""
    if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
        raise UsageError(
            f"this {type(module).__name__} is compiled as a whole, which needs all its "
            "weights at once: wrap the module as it was, with compile: true in the "
            "policy"
        )


def check_decompressed(module: nn.Module) -> None:
    """Raises UsageError for a model whose first forward makes all of its weights at
    once of those that compressed-tensors keeps."""
    quantizer: Any = getattr(module, "hf_quantizer", None)
    settings = getattr(quantizer, "quantization_config", None)
    method = getattr(settings, "quant_method", None)
    if getattr(method, "value", method) == "compressed-tensors":
        raise UsageError(
            f"this {type(module).__name__} holds weights of compressed-tensors, and "
            "decompresses all of them when it first runs: penstock.load(folder) "
            "streams them as they are stored; or load the model with "
            "CompressedTensorsConfig(dequantize=True)"
        )


def check_not_traced() -> None:
    """Raises UsageError while torch traces calls into a graph. The graph would later
    run with whatever weights are in the slots then."""
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    is_recorded = proxies is not None and proxies.get_proxy_mode() is not None
    if is_recorded or torch._C._get_tracing_state() is not None:
        raise _no_graph()


def _no_graph() -> PenstockError:
    return UsageError(
        "a streamed model cannot be traced, scripted or exported: its weights are not "
        "there at once; do that with the model as transformers loads it, or after "
        "penstock.unwrap"
    )


def _no_compiler() -> PenstockError:
    return UsageError(
        "a streamed model cannot be compiled as a whole: its weights are not there at "
        "once; compile: true in the policy compiles it block by block"
    )


def _kinds_of_tensors(module: nn.Module) -> list[torch.Tensor]:
    """One tensor of `module` for each pair of dtype and device."""
    tensors = [*module.parameters(), *module.buffers()]
    return list({(t.dtype, t.device): t for t in tensors}.values())
