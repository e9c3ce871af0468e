"""A model that is loaded for a job, and the statistics of computing with it, in one
process or several."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...io.closing import Closing
from ...io.sharing.ring import Seat
from ...io.timeline import Span
from ...scheduler.ranks.post import Post
from ..engine.counters import Statistics
from ..model import engine_of, load_for, unwrap
from ..policy import Policy
from ..reports.rank_record import RankRecord
from ..rows.text import load_tokenizer
from ..settings.memory_budget import Use
from ..tasks.task_progress import TaskProgress
from .look import ProgressSnapshot, look_at


@dataclass(frozen=True, slots=True)
class WorkerResult:
    """The counters of one process that computed for a job."""

    progress: TaskProgress
    statistics: Statistics
    dtype: str
    """The dtype that the largest tensor computes in."""
    spans: Sequence[Span] = ()
    """The timeline of the last passes; empty while the job runs."""
    first_unit_at: float | None = None
    """When the first unit began to compute (`time.perf_counter`)."""
    others: Sequence[RankRecord] = ()
    """The records of the ranks that share the model with this process."""


class Loaded(Closing):
    """The checkpoint `model`, streamed under `policy`, and its tokenizer. With `post`,
    other ranks share the model; with `seat`, other workers what is read. Raises what
    `load` raises, and UsageError where there is no tokenizer."""

    def __init__(
        self,
        model: Path,
        policy: Policy,
        use: Use = "any",
        post: Post | None = None,
        seat: Seat | None = None,
    ) -> None:
        self.model: Any = load_for(use, model, policy, post, seat)
        try:
            self.tokenizer: Any = load_tokenizer(
                model, trust_remote_code=policy.trust_remote_code
            )
        except BaseException:
            unwrap(self.model)
            raise
        self.engine = engine_of(self.model)
        largest = max(self.engine.recipes.values(), key=lambda recipe: recipe.nbytes)
        self._dtype = str(largest.dtype).removeprefix("torch.")
        self._is_closed = False

    def look(self, progress: TaskProgress) -> ProgressSnapshot:
        return look_at(self.engine, progress)

    def counted(self, progress: TaskProgress) -> WorkerResult:
        """The counters so far."""
        return WorkerResult(progress, self.engine.statistics(), self._dtype)

    def computed(self, progress: TaskProgress) -> WorkerResult:
        """The counters at the end, with the timeline."""
        return replace(
            self.counted(progress),
            spans=self.engine.timeline.spans(),
            first_unit_at=self.engine.first_unit_at,
        )

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            unwrap(self.model)
