"""Which ids, and how many of them, a model can take."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .row_error import RowError


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one model.

    `num_ids` is the number of rows of its embedding table, and `context` is the number
    of tokens that it can attend to. Each is None if it is not known.
    """

    num_ids: int | None
    context: int | None

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raises RowError if the model does not have a token of `ids`."""
        if self.num_ids is not None and ids and max(ids) >= self.num_ids:
            raise RowError(
                f"the text has token {max(ids)}, but the model knows tokens 0 to "
                f"{self.num_ids - 1}: its tokenizer is another model's, or has tokens "
                "that were added later"
            )

    def pad_of(self, *wanted: int | None) -> int:
        """The id to use for padding: the first of `wanted` that the model has, else 0.
        Attention does not see it."""
        for pad in wanted:
            if pad is not None and 0 <= pad < (self.num_ids or pad + 1):
                return int(pad)
        return 0


def limits_of(model: Any) -> Limits:
    """The limits of a transformers `model`."""
    return Limits(_num_ids(model), context_length(model))


def context_length(model: Any) -> int | None:
    """The most tokens that the model can attend to; None if its config sets no limit.

    Some models, like RoBERTa, count positions from the one after padding. Then the
    positions before it do not count.
    """
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
