"""One run of a sweep whose micro-batches all ranks compute together."""

from typing import Any

from ...io.errors import RanksError
from .lockstep import agreed
from .post import Post


class Unison:
    """What the first rank decides for all ranks, which run the same micro-batches in
    the same order. `run` counts the runs of the model."""

    def __init__(self, post: Post, run: int) -> None:
        self._post = post
        self._run = run
        self._num_asked = 0

    def agree(self, what: str, value: Any) -> Any:
        """The first rank's `value`, which JSON can hold, on all ranks. Raises
        RanksError if that rank decides something else than `what` now."""
        self._num_asked += 1
        place = f"run {self._run}, {what} {self._num_asked}"
        found = agreed(self._post, [place, value])
        if isinstance(found, list) and len(found) == 2 and found[0] == place:
            return found[1]
        raise RanksError(
            f"ranks run different things: rank {self._post.rank} is at {place}, and "
            "the first rank is not: give all ranks the same function and the same "
            "batches"
        )
