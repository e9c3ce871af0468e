"""What a command does with rows, as a value. The command line reads its options from
it; jobs, plans and searches ask it what they need to know of the work."""

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

from ..files.parts import Cut, NumberedRows, lazy_parts
from ..settings.memory_budget import Use
from .pools import LAZY_ROWS, prompts_pooled, tokens_pooled
from .task_progress import TaskProgress

if TYPE_CHECKING:
    from ..policy import Policy
    from ..rows.row_error import RowError

# A part is two pools of what is packed together: a few passes over the weights, which
# is what a job that is killed does again.
_POOLS = 2
_TOKEN_BYTES = 4
_MOST_ROWS = 4096
_MOST_BYTES = 64 << 20


class Option(NamedTuple):
    """Marks a field of a task as an option of its command."""

    help: str
    flag: str | None = None
    """Such as `--label`. None: the field's name, with dashes."""
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
    """The job's stage while rows are computed, for progress bars: "scoring"."""
    row_help: ClassVar[str]
    """What a row looks like, for `--help`."""
    result_help: ClassVar[str]
    """What a result looks like, for `--help`."""
    row_keys: ClassVar[Mapping[str, str]]
    """The keys of which a row needs one, each with what error messages call it."""
    columns: ClassVar[Mapping[str, str]]
    """The columns that results add to a table, with their Arrow types."""

    keeps_kv: ClassVar[bool] = False
    """Whether a row's keys and values are kept from one pass over the weights to the
    next: the row comes in as a prompt, then each pass gives it one token more. Of other
    tasks the tokens in flight share a pass, and are done after it."""
    runs_head: ClassVar[bool] = True
    """Whether the model's head makes logits; without it hidden states are enough."""

    @property
    def num_passes(self) -> int:
        """Passes over the weights that a micro-batch needs."""
        return 1

    @property
    def new_tokens(self) -> int:
        """The most tokens that a row gets; 0 where rows get none."""
        return 0

    @property
    def unit_in_flight(self) -> Literal["tokens", "sequences"]:
        """What is counted of the work that shares a pass."""
        return "sequences" if self.keeps_kv else "tokens"

    @property
    def in_flight_key(self) -> str:
        """The policy's key for how many of them share a pass."""
        return f"{self.unit_in_flight}_in_flight"

    @property
    def micro_batch_key(self) -> str:
        """The policy's key for how many of them one call of the model has."""
        return f"micro_batch_{self.unit_in_flight}"

    @property
    def rate_unit(self) -> str:
        """The unit in which its speed is told."""
        return "output tokens/s" if self.keeps_kv else "tokens/s"

    @property
    def joins_products(self) -> bool:
        """Whether matrix products of several micro-batches run as one, where `coalesce`
        lets them: products of one token a row are too narrow for a device."""
        return self.keeps_kv

    @property
    def use(self) -> Use:
        """What the model is loaded for, which says how memory is divided."""
        return "completions" if self.keeps_kv else "rows"

    def in_flight(self, policy: "Policy") -> int:
        """Tokens, or sequences, that share a pass under `policy`."""
        return int(getattr(policy, self.in_flight_key))

    def identity(self) -> dict[str, Any]:
        """The name and the options as JSON has them: what decides on results. Jobs that
        were begun compare it with their own."""
        options = {name: _plain(getattr(self, name)) for name in options_of(type(self))}
        return {"task": self.name, **options}

    def cut(self, policy: "Policy") -> Cut:
        """How rows are best cut into parts. Rows of two parts are never packed
        together, so what is computed for a part does not depend on the others."""
        if self.keeps_kv:
            return Cut(prompts_pooled(policy), _MOST_BYTES)
        num_bytes = _POOLS * _TOKEN_BYTES * tokens_pooled(policy)
        return Cut(_MOST_ROWS, min(num_bytes, _MOST_BYTES))

    def promised(self, policy: "Policy", num_micro_batches: int) -> dict[str, int]:
        """What the policy promises a job of `num_micro_batches`, for its report: how
        many of them share a pass, and passes over the weights, at most."""
        total = self.in_flight(policy)
        each = min(int(getattr(policy, self.micro_batch_key)), total)
        width = total // each
        return {
            "micro_batches_in_flight": width,
            "passes": -(-num_micro_batches // width) * self.num_passes,
        }

    @classmethod
    def of(cls, **options: Any) -> Self:
        """The task with the options that the Python function of its name takes. Raises
        TypeError for others."""
        return cls(**options)

    @classmethod
    def typical(cls, new_tokens: int) -> Self:
        """The task for a plan or a search: with the options that most jobs have, and
        `new_tokens` for each row where rows get any."""
        return cls()

    def shortened(self, new_tokens: int) -> Self:
        """The same task with at most `new_tokens` for each row."""
        return self

    def made_up_row(self, num_tokens: int) -> Mapping[str, Any] | None:
        """A row of `num_tokens` for `CountingTokenizer`, to measure with. None where
        only real rows will do."""
        return {"text": f"{num_tokens}"}

    def run(
        self,
        model: Any,
        rows: Iterable[Mapping[str, Any]],
        *,
        tokenizer: Any = None,
        progress: TaskProgress | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Yields a result for each of `rows`, which may be lazy, in their order. Raises
        UsageError for options that do not fit the model."""
        parts = lazy_parts(rows, LAZY_ROWS)
        return self.results(model, tokenizer, parts, progress or self.new_progress())

    @abstractmethod
    def new_progress(self) -> TaskProgress:
        """Counters at zero, as `results` counts with."""

    @abstractmethod
    def results(
        self,
        model: Any,
        tokenizer: Any,
        parts: Iterator[NumberedRows],
        progress: TaskProgress,
    ) -> Iterator[dict[str, Any]]:
        """Yields a result for each row of `parts`, in their order, and counts in
        `progress` (one of `new_progress`). No two parts share a micro-batch, so the
        results of a part are, bit for bit, the same without the others. `model` is one
        of `penstock.load`; a `tokenizer` of None is the one beside its checkpoint.
        Raises UsageError for options that do not fit the model."""

    @abstractmethod
    def check_model(self, model: Any) -> None:
        """Raises UsageError where the transformers `model`, which may be on meta, does
        not do this task."""

    @abstractmethod
    def token_lengths(
        self, tokenizer: Any, rows: Sequence[Mapping[str, Any]]
    ) -> "list[int | RowError]":
        """How many tokens of each of `rows` run through the model at first, or why
        there are none."""


@cache
def options_of(task: type[Task]) -> Mapping[str, Option]:
    """The options of a task by their fields, in their order."""
    hints = get_type_hints(task, include_extras=True)
    found = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {
        name: option
        for name, marks in found.items()
        for option in marks
        if isinstance(option, Option)
    }


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value
