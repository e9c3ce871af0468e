"""The task of `penstock classify`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from ..files.json_rows import ASKED_KEYS
from .task import Option, PackedTask

if TYPE_CHECKING:
    from ..rows.row_error import RowError
    from .classify import ClassifyRunner


@dataclass(frozen=True)
class Classify(PackedTask):
    """Which of some labels comes next, and how likely, under a causal language model.

    Example: `penstock classify ./llama-3b reviews.jsonl -o labels.jsonl --label " good"
    --label " bad"`
    """

    name: ClassVar[str] = "classify"
    title: ClassVar[str] = "classifying"
    row_help: ClassVar[str] = '{"id", "prompt"}, and may have "labels"'
    result_help: ClassVar[str] = (
        '{"id", "label", "logprobs", "probabilities", "tokens"}'
    )
    row_keys: ClassVar[Mapping[str, str]] = ASKED_KEYS
    columns: ClassVar[Mapping[str, str]] = {"label": "string", "tokens": "int64"}

    labels: Annotated[
        tuple[str, ...],
        Option(
            "What may come next, of rows without labels. Repeatable. Begin it "
            "with a space where the text goes on with one.",
            flag="--label",
        ),
    ] = ()

    @property
    def num_passes(self) -> int:
        """One for prompts, another for labels of several tokens."""
        return 2

    @classmethod
    def of(cls, *, labels: Sequence[str] = ()) -> Self:  # type: ignore[override]
        return cls(tuple(labels))

    @classmethod
    def typical(cls, new_tokens: int) -> Self:
        """With two short labels for rows that have none of their own."""
        return cls((" yes", " no"))

    def made_up_row(self, num_tokens: int) -> Mapping[str, Any] | None:
        """None: a made-up prompt has no labels."""
        return None

    def runner(self, model: Any, tokenizer: Any) -> "ClassifyRunner":
        from .classify import ClassifyRunner

        return ClassifyRunner(self, model, tokenizer)

    def check_model(self, model: Any) -> None:
        from .head import check_causal

        check_causal(model)

    def token_lengths(
        self, tokenizer: Any, rows: Sequence[Mapping[str, Any]]
    ) -> "list[int | RowError]":
        from ..rows.labels import tokenize_labels
        from ..rows.row_error import RowError

        def length_of(row: Mapping[str, Any]) -> int | RowError:
            try:
                return len(tokenize_labels(tokenizer, row, self.labels).prompt)
            except RowError as error:
                return error

        return [length_of(row) for row in rows]
