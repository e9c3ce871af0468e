"""The task of `penstock embed`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from ..files.json_rows import TEXT_KEYS
from ..settings.values import Pooling
from .task import Option, PackedTask

if TYPE_CHECKING:
    from ..rows.row_error import RowError
    from .embed import EmbedRunner


@dataclass(frozen=True)
class Embed(PackedTask):
    """A vector for each text, by an encoder or a decoder.

    Example: `penstock embed ./minilm texts.jsonl -o vectors.parquet --report out/`
    """

    name: ClassVar[str] = "embed"
    title: ClassVar[str] = "embedding"
    row_help: ClassVar[str] = '{"id", "text"}'
    result_help: ClassVar[str] = '{"id", "embedding", "tokens"}'
    row_keys: ClassVar[Mapping[str, str]] = TEXT_KEYS
    columns: ClassVar[Mapping[str, str]] = {
        "embedding": "list<float>",
        "tokens": "int64",
    }
    runs_head: ClassVar[bool] = False

    pooling: Annotated[
        Pooling,
        Option(
            "How one vector is made of those of a text's tokens: their mean, the "
            "first (cls), the last, or the max of each number. auto: as the "
            "checkpoint's sentence-transformers files say, else mean for an encoder "
            "and last for a decoder."
        ),
    ] = "auto"
    normalize: Annotated[
        bool | None,
        Option(
            "Whether vectors have length 1. Without it, as the checkpoint's "
            "sentence-transformers files say, else not."
        ),
    ] = None
    truncate: Annotated[
        int | None,
        Option(
            "Cut texts to so many tokens. Without it one that is longer than the "
            "model's context is an error."
        ),
    ] = None

    def runner(self, model: Any, tokenizer: Any) -> "EmbedRunner":
        from .embed import EmbedRunner

        return EmbedRunner(self, model, tokenizer)

    def check_model(self, model: Any) -> None:
        from ..traces.model_kind import base_of

        base_of(model)

    def token_lengths(
        self, tokenizer: Any, rows: Sequence[Mapping[str, Any]]
    ) -> "list[int | RowError]":
        from ..rows.row_error import RowError
        from ..rows.text import tokenize_texts

        found = tokenize_texts(tokenizer, rows)
        return [
            ids if isinstance(ids, RowError) else len(ids[: self.truncate])
            for ids in found
        ]
