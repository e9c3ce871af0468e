"""What a model can take of a row: which ids, and how many."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .row_error import RowError


@dataclass(frozen=True, slots=True)
class Limits:
    """`num_ids` is how many rows the model's table of embeddings has, `context` how
    many tokens it can attend to; None where there is no telling."""

    num_ids: int | None
    context: int | None

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raises RowError for a token that the model has not."""
        if self.num_ids is not None and ids and max(ids) >= self.num_ids:
            raise RowError(
                f"the text has token {max(ids)}, but the model knows tokens 0 to "
                f"{self.num_ids - 1}: its tokenizer is another model's, or has tokens "
                "that were added later"
            )

    def pad_of(self, *wanted: int | None) -> int:
        """The id that stands where nothing does: the first of `wanted` that the model
        has, else 0. Attention does not look at it."""
        for pad in wanted:
            if pad is not None and 0 <= pad < (self.num_ids or pad + 1):
                return int(pad)
        return 0


def limits_of(model: Any) -> Limits:
    """Those of a `model` from transformers."""
    return Limits(_num_ids(model), context_length(model))


def context_length(model: Any) -> int | None:
    """Most tokens that the model can attend to, or None where its config sets no limit.
    Where places are counted from behind that of padding, as RoBERTa does, those before
    are none."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value - _places_before(model, value)
    return None


def _places_before(model: Any, num_places: int) -> int:
    for name, module in model.named_modules():
        if (
            name.endswith("position_embeddings")
            and isinstance(module, nn.Embedding)
            and module.num_embeddings == num_places
            and module.padding_idx is not None
        ):
            return module.padding_idx + 1
    return 0


def _num_ids(model: Any) -> int | None:
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None
