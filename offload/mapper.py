"""A task for tables of rows, for the workers of a Ray Data cluster. It imports no Ray:
anything may call it with Arrow tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .model import load, unwrap
from .policy import Policy
from .rows.text import tokenizer_of
from .tasks.registry import task_named

if TYPE_CHECKING:
    import pyarrow


class Mapper:
    """For `ray.data.Dataset.map_batches` with `batch_format="pyarrow"`: an actor for
    each GPU or node, which loads `model` once.

    `task` is `score`, `generate`, `embed` or `classify`, `options` are those of the
    function of that name. A table of rows comes back with the results' columns added,
    and `error` (null for a row that has none). Rows of one batch share passes over the
    weights: let it have thousands of tokens.

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
        own = options.pop("tokenizer", None)
        self._task = task_named(task).of(**options)
        self._model = load(model, policy)
        self._tokenizer = own or tokenizer_of(self._model)

    def __call__(self, table: "pyarrow.Table") -> "pyarrow.Table":
        """`table` with the columns of the task's results. Raises what ends a job; Ray
        then gives the rows to another actor."""
        # Arrow gives a row null for a key that only other rows have.
        rows = (
            {key: value for key, value in row.items() if value is not None}
            for row in table.to_pylist()
        )
        results = list(self._task.run(self._model, rows, tokenizer=self._tokenizer))
        return _with_columns(table, results, self._task.columns)

    def close(self) -> None:
        """Closes the model. May be called twice."""
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
