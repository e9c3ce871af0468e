"""Log-probabilities of given tokens without ever holding all the logits.

A causal language model is a base that makes hidden states and a tail that makes logits
of them. The tail is the model's own forward, run on a few positions at a time around a
base that hands out hidden states made before: scalings and soft caps come along.
"""

import copy
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import nn

from ...io.devices.known import known_to
from ...io.errors import PenstockError, UsageError
from ..model import engine_of
from ..ranks.exchange import Exchange
from ..weights.placeholder import StreamedParameter


class Predictions(NamedTuple):
    """What a model says of every token but the first, given those before it."""

    logprobs: torch.Tensor
    """The natural log-probability of the token: float32 [rows, length - 1]."""
    tops: torch.Tensor
    """The most probable token: int64 [rows, length - 1]; empty where it was not asked
    for."""


class CausalScorer:
    """Scores tokens with the causal language model `model` (streamed or not).

    `max_logits_bytes` bounds the logits and their float32 copies that exist at a time.
    """

    def __init__(self, model: Any, *, max_logits_bytes: int) -> None:
        check_causal(model)
        self._model = model
        self._max_logits_bytes = max_logits_bytes
        self._vocabulary = int(model.get_output_embeddings().weight.shape[0])
        self._outputs: ContextVar[Any] = ContextVar("outputs")
        self._base = _base_of(model)
        self._exchange = _exchange_of(model)
        self._tail = None if self._base is None else self._make_tail(self._base)

    @property
    def is_chunked(self) -> bool:
        """Whether the model's head can be run on a few positions at a time. Else the
        logits of a micro-batch are made all at once."""
        return self._tail is not None

    def log_probabilities(
        self, ids: torch.Tensor, attention_mask: torch.Tensor | None, **inputs: Any
    ) -> torch.Tensor:
        """The natural log-probability of every token of `ids` [rows, length] but the
        first, given those before it: float32 [rows, length - 1]. `attention_mask` is 0
        at padding, which is on the right; the values there mean nothing. `inputs` are
        further arguments of the model, such as a cache of earlier tokens."""
        logits_of = self._run(ids, attention_mask, {"use_cache": False, **inputs})
        step = self._step(ids)
        return self._on_head(lambda: _by_chunks(logits_of, ids[:, 1:], step).logprobs)

    def predictions(
        self, ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> Predictions:
        """Like `log_probabilities`, with the token that is most probable at each
        place."""
        logits_of = self._run(ids, attention_mask, {"use_cache": False})
        return _by_chunks(logits_of, ids[:, 1:], self._step(ids), with_tops=True)

    def next_logits(
        self, ids: torch.Tensor, attention_mask: torch.Tensor | None, **inputs: Any
    ) -> torch.Tensor:
        """The logits of the token that follows the last of `ids` [rows, length]:
        float32 [rows, vocabulary]."""
        length = ids.shape[1]
        logits_of = self._run(ids, attention_mask, inputs)
        last = slice(length - 1, length)
        return self._on_head(lambda: logits_of(last)[:, -1].float())

    def _on_head(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`compute()`, which runs the head; on one rank, if several share the model."""
        return compute() if self._exchange is None else self._exchange.on_head(compute)

    def _run(
        self,
        ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        inputs: dict[str, Any],
    ) -> Callable[[slice], torch.Tensor]:
        """Runs the model up to its hidden states. Returns a function from a slice of
        positions to their logits."""
        inputs = {"input_ids": ids, **inputs}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        if self._tail is None or self._base is None:
            logits = self._model(**inputs).logits
            return lambda part: logits[:, part]
        exchange = self._exchange
        with nullcontext() if exchange is None else exchange.kept_back.staying():
            outputs = self._base(**inputs)
        hidden = outputs.last_hidden_state
        tail = self._tail

        def logits_of(part: slice) -> torch.Tensor:
            fields = {**outputs, "last_hidden_state": hidden[:, part].contiguous()}
            self._outputs.set(type(outputs)(**fields))
            logits = tail(input_ids=ids[:, part]).logits
            assert isinstance(logits, torch.Tensor)
            return logits

        return logits_of

    def _step(self, ids: torch.Tensor) -> int:
        """Positions whose logits are made at a time. Each takes its logits in the
        model's dtype, their float32 copy and one float32 temporary."""
        per_position = ids.shape[0] * self._vocabulary * (4 + 4 + 4)
        return max(1, self._max_logits_bytes // per_position)

    def _make_tail(self, base: nn.Module) -> Any:
        """The model with `base` replaced by one that returns what `_outputs` holds. A
        shallow copy: the model itself stays as it is, and the head is the same module
        with the same hooks."""
        tail = copy.copy(self._model)
        tail.__dict__["_modules"] = {
            **self._model._modules,
            self._model.base_model_prefix: _Given(self._outputs, base),
        }
        tail.__dict__["_forward_pre_hooks"] = {}
        return tail


def _exchange_of(model: Any) -> Exchange | None:
    """What speaks to the ranks that share `model`, streamed or not; None if there are
    none."""
    try:
        return engine_of(model).exchange
    except PenstockError:
        return None


class _Given(nn.Module):
    """Stands for the base, and for the decoder inside it where the tail calls that one.
    Its forward returns the current micro-batch's outputs; attributes that are no
    modules are the base's."""

    def __init__(self, outputs: ContextVar[Any], base: nn.Module) -> None:
        super().__init__()
        self.__dict__["_base"] = base  # not a submodule, so not a part of the tail
        self._outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._outputs.get()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_base"], name)
        return self if isinstance(value, nn.Module) else value


def _by_chunks(
    logits_of: Callable[[slice], torch.Tensor],
    targets: torch.Tensor,
    step: int,
    *,
    with_tops: bool = False,
) -> Predictions:
    rows, length = targets.shape
    result = torch.empty(rows, length, dtype=torch.float32, device=targets.device)
    tops = targets.new_empty(rows, length if with_tops else 0)
    for start in range(0, length, step):
        part = slice(start, min(start + step, length))
        logits = logits_of(part).float()
        chosen = logits.gather(-1, targets[:, part, None]).squeeze(-1)
        result[:, part] = chosen - torch.logsumexp(logits, dim=-1)
        if with_tops:
            tops[:, part] = logits.argmax(-1)
    return Predictions(result, tops)


def padding_mask(mask: torch.Tensor, device: torch.device) -> torch.Tensor | None:
    """`mask`, 0 at padding, on `device`; on the CPU None if nothing is padding.

    On an accelerator transformers also asks, without a mask, whether several texts were
    packed into a row, and waits for the answer. It asks a full mask whether it is full,
    which the host knows, and then does what it does without one.
    """
    if device.type == "cpu" and mask.all():
        return None
    return known_to(mask, device)


def check_causal(model: Any) -> None:
    name = type(model).__name__
    config = getattr(model, "config", None)
    is_causal = (
        hasattr(model, "can_generate")
        and model.can_generate()
        and not getattr(config, "is_encoder_decoder", False)
        and model.get_output_embeddings() is not None
    )
    if not is_causal:
        raise UsageError(
            f"{name} is no causal language model: scoring needs one that predicts the "
            "next token (a ...ForCausalLM or ...LMHeadModel)"
        )
    check_head(model)


def check_head(model: Any) -> None:
    """Raises CheckpointError for a model whose checkpoint has no head."""
    head = model.get_output_embeddings()
    for parameter in head.parameters() if head is not None else ():
        if isinstance(parameter, StreamedParameter):
            parameter.check_exists()


def _base_of(model: Any) -> Any | None:
    """The module that makes hidden states; None where the tail cannot be run without
    it."""
    base = getattr(model, model.base_model_prefix, None)
    parameters = inspect.signature(type(model).forward).parameters
    if base is None or base is model or "logits_to_keep" not in parameters:
        return None
    head = model.get_output_embeddings()
    return None if any(module is head for module in base.modules()) else base
