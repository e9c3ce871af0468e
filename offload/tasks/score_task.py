"""The task of `penstock score`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from ..files.json_rows import SCORED_KEYS
from .task import Option, PackedTask

if TYPE_CHECKING:
    from ..rows.row_error import RowError
    from .score import ScoreRunner


@dataclass(frozen=True)
class Score(PackedTask):
    """Log-probability of each text (or completion) under a causal language model.

    Example: `penstock score ./llama-3b texts.jsonl -o scores.jsonl --set
    device_memory=1GiB --report out/`
    """

    name: ClassVar[str] = "score"
    title: ClassVar[str] = "scoring"
    row_help: ClassVar[str] = '{"id", "text"} or {"id", "prompt", "completion"}'
    result_help: ClassVar[str] = '{"id", "logprob", "tokens", "perplexity"}'
    row_keys: ClassVar[Mapping[str, str]] = SCORED_KEYS
    columns: ClassVar[Mapping[str, str]] = {
        "logprob": "double",
        "tokens": "int64",
        "perplexity": "double",
    }

    window: Annotated[
        int | None,
        Option(
            "Score texts longer than the model's context in windows of so many "
            "tokens. Without it such a row is an error."
        ),
    ] = None
    stride: Annotated[
        int | None,
        Option("Tokens by which windows advance (default: half a window)."),
    ] = None

    def runner(self, model: Any, tokenizer: Any) -> "ScoreRunner":
        from .score import ScoreRunner

        return ScoreRunner(self, model, tokenizer)

    def check_model(self, model: Any) -> None:
        from .head import check_causal

        check_causal(model)

    def token_lengths(
        self, tokenizer: Any, rows: Sequence[Mapping[str, Any]]
    ) -> "list[int | RowError]":
        from ..rows.row_error import RowError
        from ..rows.text import tokenize_all

        found = tokenize_all(tokenizer, rows)
        return [row if isinstance(row, RowError) else len(row.ids) for row in found]
