"""The task of `penstock generate`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from ...io.errors import UsageError
from ..files.json_rows import PROMPT_KEYS
from .task import Option, Task
from .task_progress import GenerateProgress, TaskProgress

if TYPE_CHECKING:
    from ..files.parts import NumberedRows
    from ..rows.row_error import RowError

_OWN_OPTIONS = {
    "max_new_tokens": "--max-new-tokens",
    "seed": "--seed",
    "stop": "--stop",
    **dict.fromkeys(("model", "parts", "progress", "tokenizer"), "something else"),
}
"""Names that are no options of transformers' `generate` here, and what to give
instead."""


@dataclass(frozen=True)
class Generate(Task):
    """Completes each prompt (or chat) with a language model.

    Example: `penstock generate ./llama-3b prompts.jsonl -o completions.jsonl
    --max-new-tokens 64 --set device_memory=1GiB --set sequences_in_flight=256`
    """

    name: ClassVar[str] = "generate"
    title: ClassVar[str] = "generating"
    row_help: ClassVar[str] = '{"id", "prompt"} or {"id", "messages"}'
    result_help: ClassVar[str] = '{"id", "completion", "tokens", "finish_reason"}'
    row_keys: ClassVar[Mapping[str, str]] = PROMPT_KEYS
    columns: ClassVar[Mapping[str, str]] = {
        "completion": "string",
        "tokens": "int64",
        "finish_reason": "string",
    }
    keeps_kv: ClassVar[bool] = True

    max_new_tokens: Annotated[int, Option("Most tokens that a completion may have.")]
    stop: Annotated[
        tuple[str, ...],
        Option("A completion ends before this text. Repeatable."),
    ] = ()
    temperature: Annotated[
        float | None,
        Option(
            "Sample at this temperature; 0: take the likeliest. Without it, as "
            "the model's generation_config.json says."
        ),
    ] = None
    seed: Annotated[
        int, Option("Of what is sampled; each row has its own random state.")
    ] = 0
    options: Annotated[
        Mapping[str, Any],
        Option(
            "Any other option of transformers' generate, such as top_p=0.9, "
            "repetition_penalty=1.1 or num_beams=4. Repeatable.",
            flag="--option",
            metavar="KEY=VALUE",
        ),
    ] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises UsageError where `options` has a name that another field or argument
        has."""
        if own := _OWN_OPTIONS.keys() & self.options.keys():
            key = min(own)
            raise UsageError(f"{key} is no --option: give {_OWN_OPTIONS[key]}")

    @property
    def all_options(self) -> dict[str, Any]:
        """The options for transformers' `generate`, with the temperature."""
        if self.temperature is None:
            return dict(self.options)
        return {**self.options, "temperature": self.temperature}

    @property
    def num_passes(self) -> int:
        """The most passes: one for each new token."""
        return self.max_new_tokens

    @property
    def new_tokens(self) -> int:
        return self.max_new_tokens

    def identity(self) -> dict[str, Any]:
        """The name and options, with the temperature among those of transformers'
        `generate`, where jobs have always had it."""
        found = super().identity()
        del found["temperature"]
        return {**found, "options": self.all_options}

    @classmethod
    def of(cls, *, stop: Sequence[str] = (), **options: Any) -> Self:
        """The task with the arguments of `penstock.generate`: those that are no field
        of this class are options of transformers' `generate`."""
        names = ("max_new_tokens", "seed")
        own = {name: options.pop(name) for name in names if name in options}
        return cls(**own, stop=tuple(stop), options=options)

    @classmethod
    def typical(cls, new_tokens: int) -> Self:
        return cls(new_tokens)

    def shortened(self, new_tokens: int) -> Self:
        return replace(self, max_new_tokens=min(self.max_new_tokens, new_tokens))

    def new_progress(self) -> TaskProgress:
        return GenerateProgress()

    def results(
        self,
        model: Any,
        tokenizer: Any,
        parts: "Iterator[NumberedRows]",
        progress: TaskProgress,
    ) -> Iterator[dict[str, Any]]:
        from .generate import GenerateRunner

        assert isinstance(progress, GenerateProgress), "it is one of new_progress"
        return GenerateRunner.of(self, model, tokenizer, progress).run(parts)

    def check_model(self, model: Any) -> None:
        from .generate import check_generates

        check_generates(model)

    def token_lengths(
        self, tokenizer: Any, rows: Sequence[Mapping[str, Any]]
    ) -> "list[int | RowError]":
        from ..rows.row_error import RowError
        from ..rows.text import tokenize_prompt

        def length_of(row: Mapping[str, Any]) -> int | RowError:
            try:
                if "error" in row:
                    raise RowError(row["error"])
                return len(tokenize_prompt(tokenizer, row))
            except RowError as error:
                return error

        return [length_of(row) for row in rows]
