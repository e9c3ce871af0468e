"""Runs a task on each worker of a Ray Data cluster, over tables of rows.

It does not import Ray: anything can call it with Arrow tables.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..io.errors import UsageError
from .model import load, unwrap
from .policy import Policy
from .rows.text import tokenizer_of
from .tasks.classify import classify
from .tasks.embed import embed
from .tasks.generate import generate
from .tasks.score import score

if TYPE_CHECKING:
    import pyarrow

_TASKS: dict[str, tuple[Callable[..., Iterator[dict[str, Any]]], dict[str, str]]] = {
    "score": (score, {"logprob": "double", "tokens": "int64", "perplexity": "double"}),
    "generate": (
        generate,
        {"completion": "string", "tokens": "int64", "finish_reason": "string"},
    ),
    "embed": (embed, {"embedding": "list<float>", "tokens": "int64"}),
    "classify": (classify, {"label": "string", "tokens": "int64"}),
}
"""For each task: its function, and the columns that it adds with their Arrow types."""


class Mapper:
    """A callable for `ray.data.Dataset.map_batches` with `batch_format="pyarrow"`.

    Each actor loads `model` once, on its GPU or node. `task` is `score`, `generate`,
    `embed` or `classify`; `options` are those of the function with that name. A table
    of rows is returned with the columns of the results added, and the column `error`,
    which is null if the row has none. The rows of one batch share passes over the
    weights, so a batch should have thousands of tokens.

        rows = ray.data.read_json("texts.jsonl")
        rows = rows.map_batches(
            Mapper,
            fn_constructor_kwargs={"model": "llama-70b", "policy": {"device": "cuda"}},
            batch_format="pyarrow",
            batch_size=256,
            num_gpus=1,
            compute=ray.data.ActorPoolStrategy(size=8),
        )
    """

    def __init__(
        self,
        model: str | Path,
        policy: Policy | Mapping[str, Any] | None = None,
        *,
        task: str = "score",
        **options: Any,
    ) -> None:
        if task not in _TASKS:
            raise UsageError(f"there is no task {task!r}: {', '.join(_TASKS)}")
        self._run, self._columns = _TASKS[task]
        self._options = options
        self._model = load(model, policy)
        self._tokenizer = tokenizer_of(self._model)

    def __call__(self, table: "pyarrow.Table") -> "pyarrow.Table":
        """`table` with the results of its rows as added columns.

        Raises errors that end the job; Ray then repeats the rows on another actor.
        """
        # Leaves out the columns that only other rows have.
        rows = (
            {key: value for key, value in row.items() if value is not None}
            for row in table.to_pylist()
        )
        options = {"tokenizer": self._tokenizer, **self._options}
        results = list(self._run(self._model, rows, **options))
        return _with_columns(table, results, self._columns)

    def close(self) -> None:
        """Frees the model's memory and files. May be called twice."""
        model, self._model = self._model, None
        if model is not None:
            unwrap(model)


def _with_columns(
    table: "pyarrow.Table", results: list[dict[str, Any]], columns: Mapping[str, str]
) -> "pyarrow.Table":
    import pyarrow

    types = {**columns, "error": "string"}
    more = {key for result in results for key in result} - types.keys() - {"id"}
    for name in (*types, *sorted(more)):
        values = [result.get(name) for result in results]
        if name in types:
            column = pyarrow.array(values, _type(types[name]))
        else:
            column = pyarrow.array(values)
        if name in table.column_names:
            table = table.drop_columns([name])
        table = table.append_column(name, column)
    return table


def _type(name: str) -> "pyarrow.DataType":
    import pyarrow

    if name == "list<float>":
        return pyarrow.list_(pyarrow.float32())
    return pyarrow.type_for_alias(name)
