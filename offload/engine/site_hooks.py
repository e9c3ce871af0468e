"""The forward hooks on the modules of a streamed model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..tensor_ranks.row_exchange import RowExchange, RowHooks
from ..units.sites import ModelDivision
from ..weights.binding import Binding
from ..weights.gradients import refuse_backward, refuse_training
from .groups import Forwards
from .refusals import check_not_traced

Hook = Callable[..., Any]


class SiteHooks:
    """The hooks on the sites of a model and on the model itself, until `remove`.

    `keep_out` wraps a hook so that a compiler does not trace it.
    """

    def __init__(
        self,
        model: nn.Module,
        model_division: ModelDivision,
        forwards: Forwards,
        binding: Binding,
        keep_out: Callable[[Hook], Hook],
    ) -> None:
        self._entry = forwards.entry
        self._binding = binding
        self._handles: list[Any] = []
        self._holds_experts = {site.outer for site in model_division.sites}
        for index, site in enumerate(model_division.sites):
            if site.experts is None:  # a window is entered by the experts' forward
                self._hang(site.module, index, site.name, keep_out)
        self._handles += [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, with_kwargs=True),
        ]
        if (ranked := forwards.ranked) is not None:
            exchange = ranked.exchange
            exchange.attach(self._entry)
            if isinstance(exchange, RowExchange):
                self._handles.append(RowHooks(exchange))
            else:
                from ..ranks.stage_hooks import StageHooks  # transformers takes seconds

                self._handles.append(StageHooks(model, ranked.modules, exchange))
        self._owes_gradients = False

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _begin(self, module: nn.Module, args: Any) -> None:
        """The model's own forward begins."""
        check_not_traced()
        self._entry.abandon_plain()
        self._binding.check_resident()
        self._owes_gradients = False

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """The model's own forward has ended: its output may be used for training."""
        if self._owes_gradients and torch.is_grad_enabled():
            refuse_training(output, (args, kwargs))

    def _hang(
        self, module: nn.Module, site: int, name: str, keep_out: Callable[[Hook], Hook]
    ) -> None:
        def before(module: nn.Module, args: Any) -> None:
            check_not_traced()
            self._entry.before(site)  # returns None: a result would replace `args`

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if torch.is_grad_enabled() and not self._keeps_its_weights(site):
                refuse_backward(output, name)
                self._owes_gradients |= self._binding.wants_gradients(site)
            self._entry.after(site)

        self._handles += [
            module.register_forward_pre_hook(keep_out(before)),
            module.register_forward_hook(keep_out(after), always_call=True),
        ]

    def _keeps_its_weights(self, site: int) -> bool:
        """Whether a backward pass would find the weights of `site` unchanged, and none
        of them requires a gradient."""
        stays = self._entry.open_sites.stays(site)
        stays = stays and site not in self._holds_experts
        return stays and not self._binding.wants_gradients(site)
