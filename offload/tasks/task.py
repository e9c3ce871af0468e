"""What one command does with rows, as a value: its options, its identity, and what
jobs, plans and searches need to know of it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Self,
    get_type_hints,
)

from .pools import LAZY_ROWS, prompts_pooled, tokens_pooled
from .task_progress import ScoreProgress, TaskProgress

if TYPE_CHECKING:
    from ..files.parts import Cut, NumberedRows
    from ..policy import Policy
    from ..rows.row_error import RowError
    from ..settings.memory_budget import Use
    from .packed import RowRunner

_POOLS = 2
"""Pools of rows in a part: a few passes over the weights, which is the most that a job
computes again after it was killed."""
_TOKEN_BYTES = 4
_MOST_ROWS = 4096
_MOST_BYTES = 64 << 20


class Option(NamedTuple):
    """Marks a field of a task as an option of its command."""

    help: str
    flag: str | None = None
    """Such as `--label`. None: the field's name with dashes."""
    metavar: str | None = None


@dataclass(frozen=True)
class Task(ABC):
    """The work of one command, with its options.

    A task is a frozen dataclass in a file of its own, named in `registry.py`. The
    docstring of its class is the help of its command. Each field that is annotated with
    an `Option` is an option of the command line and a part of the job's identity. A
    field of a plain type, of `tuple[str, ...]` (an option that may be repeated) or of
    `Mapping[str, Any]` (`KEY=VALUE`, repeated) is read from the command line.

    Importing a task imports no torch, so that `--help` is quick: what runs the model
    lies in another file, which `results` and `check_model` import when they are called.
    """

    name: ClassVar[str]
    """The command's name."""
    title: ClassVar[str]
    """The name of the job's stage while rows are computed, such as "scoring"."""
    row_help: ClassVar[str]
    """What a row looks like, for `--help`."""
    result_help: ClassVar[str]
    """What a result looks like, for `--help`."""
    row_keys: ClassVar[Mapping[str, str]]
    """The keys of which a row needs at least one, each with its name in error
    messages."""
    columns: ClassVar[Mapping[str, str]]
    """The columns that results add to a table, with their Arrow types."""

    keeps_kv: ClassVar[bool] = False
    """Whether a row's keys and values are kept from one pass over the weights to the
    next: rows are prompts, and each pass gives each of them one token more. False: the
    tokens in flight share one pass and are done after it."""
    runs_head: ClassVar[bool] = True
    """Whether the model's head is run. Without it hidden states are enough."""

    @property
    def num_passes(self) -> int:
        """The most passes over the weights that a micro-batch needs."""
        return 1

    @property
    def new_tokens(self) -> int:
        """The most tokens that are generated for a row; 0 where none are."""
        return 0

    @property
    def unit_in_flight(self) -> Literal["tokens", "sequences"]:
        """The unit in which the work that shares a pass is counted."""
        return "sequences" if self.keeps_kv else "tokens"

    @property
    def in_flight_key(self) -> str:
        """The policy's key for how many tokens (or sequences) share a pass."""
        return f"{self.unit_in_flight}_in_flight"

    @property
    def micro_batch_key(self) -> str:
        """The policy's key for how many tokens (or sequences) go through the model in a
        call."""
        return f"micro_batch_{self.unit_in_flight}"

    @property
    def rate_unit(self) -> str:
        """The unit of the task's speed."""
        return "output tokens/s" if self.keeps_kv else "tokens/s"

    @property
    def joins_products(self) -> bool:
        """Whether matrix products of several micro-batches are computed as one, where
        the policy's `coalesce` allows it: a product of one token for each row is too
        narrow to use a device well."""
        return self.keeps_kv

    @property
    def use(self) -> "Use":
        """What the model is loaded for, which decides how memory is divided."""
        return "completions" if self.keeps_kv else "rows"

    def in_flight(self, policy: "Policy") -> int:
        """How many tokens (or sequences) share a pass under `policy`."""
        return int(getattr(policy, self.in_flight_key))

    def identity(self) -> dict[str, Any]:
        """The task's name and options, which decide on results, as JSON gives them
        back. A job's manifest keeps it; a job goes on only where it is the same."""
        options = {name: _plain(getattr(self, name)) for name in options_of(type(self))}
        return {"task": self.name, **options}

    def cut(self, policy: "Policy") -> "Cut":
        """How rows are cut into parts. Rows of two parts are never packed together, so
        what is computed for a part does not depend on the others."""
        from ..files.parts import Cut

        if self.keeps_kv:
            return Cut(prompts_pooled(policy), _MOST_BYTES)
        num_bytes = _POOLS * _TOKEN_BYTES * tokens_pooled(policy)
        return Cut(_MOST_ROWS, min(num_bytes, _MOST_BYTES))

    def promised(self, policy: "Policy", num_micro_batches: int) -> dict[str, int]:
        """For the report of a job of `num_micro_batches`: how many micro-batches share
        a pass under `policy`, and the most passes over the weights that it needs."""
        total = self.in_flight(policy)
        each = min(int(getattr(policy, self.micro_batch_key)), total)
        width = total // each
        return {
            "micro_batches_in_flight": width,
            "passes": -(-num_micro_batches // width) * self.num_passes,
        }

    @classmethod
    def of(cls, **options: Any) -> Self:
        """The task with the arguments of the Python function of its name. Raises
        TypeError for unknown ones."""
        return cls(**options)

    @classmethod
    def typical(cls, new_tokens: int) -> Self:
        """The task for a plan or a search, whose options nobody has given: the usual
        ones, and `new_tokens` for each row where tokens are generated."""
        return cls()

    def shortened(self, new_tokens: int) -> Self:
        """The same task with at most `new_tokens` for each row."""
        return self

    def made_up_row(self, num_tokens: int) -> Mapping[str, Any] | None:
        """A row of `num_tokens` tokens for `CountingTokenizer`, to measure with; None
        where only real rows will do."""
        return {"text": f"{num_tokens}"}

    def run(
        self,
        model: Any,
        rows: Iterable[Mapping[str, Any]],
        *,
        tokenizer: Any = None,
        progress: TaskProgress | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Yields a result for each of `rows`, in their order. `rows` may be lazy.
        Raises UsageError for options that do not fit the model."""
        from ..files.parts import lazy_parts

        parts = lazy_parts(rows, LAZY_ROWS)
        return self.results(model, tokenizer, parts, progress or self.new_progress())

    @abstractmethod
    def new_progress(self) -> TaskProgress:
        """New counters for `results`, all of them zero."""

    @abstractmethod
    def results(
        self,
        model: Any,
        tokenizer: Any,
        parts: "Iterator[NumberedRows]",
        progress: TaskProgress,
    ) -> Iterator[dict[str, Any]]:
        """Yields a result for each row of `parts`, in their order, and counts in
        `progress`, which comes from `new_progress`. No two parts share a micro-batch,
        so the results of a part are, bit for bit, the same without the others. `model`
        comes from `penstock.load`; a `tokenizer` of None stands for the one beside the
        checkpoint. Raises UsageError for options that do not fit the model."""

    @abstractmethod
    def check_model(self, model: Any) -> None:
        """Raises UsageError where `model`, a transformers model that may be on meta,
        cannot do this task."""

    @abstractmethod
    def token_lengths(
        self, tokenizer: Any, rows: Sequence[Mapping[str, Any]]
    ) -> "list[int | RowError]":
        """How many tokens each of `rows` has in its first call of the model, or the
        error why it has none."""


@dataclass(frozen=True)
class PackedTask(Task):
    """A task that has a runner for pieces of rows. `Packed` does the packing and the
    order of results."""

    @abstractmethod
    def runner(self, model: Any, tokenizer: Any) -> "RowRunner[Any, Any]":
        """What cuts rows into pieces, runs the streamed `model` on some of them and
        makes results. Raises UsageError for options that do not fit the model."""

    def new_progress(self) -> ScoreProgress:
        return ScoreProgress()

    def results(
        self,
        model: Any,
        tokenizer: Any,
        parts: "Iterator[NumberedRows]",
        progress: TaskProgress,
    ) -> Iterator[dict[str, Any]]:
        from ..adapters import without_wrapper
        from ..rows.text import tokenizer_of
        from .packed import Packed

        assert isinstance(progress, ScoreProgress), "it is one of new_progress"
        model = without_wrapper(model)
        runner = self.runner(model, tokenizer or tokenizer_of(model))
        return Packed(model, runner, progress).run(parts)


@cache
def options_of(task: type[Task]) -> Mapping[str, Option]:
    """The options of `task` by the names of their fields, in order."""
    hints = get_type_hints(task, include_extras=True)
    found = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {
        name: option
        for name, marks in found.items()
        for option in marks
        if isinstance(option, Option)
    }


def _plain(value: Any) -> Any:
    """`value` as JSON gives it back."""
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value
