"""Tells the dtype in which each tensor of a model is loaded."""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation


class DtypePlan:
    """Transformers' plan of dtypes for one model, most of which computes in `dtype`."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._plan = model._get_dtype_plan(dtype)
        self._search: Any = None
        if self._plan:
            self._search, self._groups, _ = build_glob_alternation(list(self._plan))

    def of(self, name: str, meta: torch.Tensor) -> torch.dtype:
        """The dtype in which the tensor `name` is loaded: the planned one, or that of
        `meta`, the tensor on meta."""
        match = self._search.search(name) if self._search is not None else None
        if match is not None:
            planned = self._plan[self._groups[match.lastgroup]]
            assert isinstance(planned, torch.dtype)
            return planned
        return meta.dtype
