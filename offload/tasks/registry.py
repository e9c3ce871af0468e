"""The tasks that there are, by the names of their commands."""

from collections.abc import Mapping

from ...io.errors import UsageError
from .classify_task import Classify
from .embed_task import Embed
from .generate_task import Generate
from .score_task import Score
from .task import Task

TASKS: Mapping[str, type[Task]] = {
    task.name: task
    for task in (
        Score,
        Generate,
        Embed,
        Classify,
    )
}
"""All tasks by name, in the order of `penstock --help`. A new task gets its line
here."""


def task_named(name: str) -> type[Task]:
    """The task called `name`. Raises UsageError where there is none."""
    if name not in TASKS:
        raise UsageError(f"there is no task {name!r}: {', '.join(TASKS)}")
    return TASKS[name]
