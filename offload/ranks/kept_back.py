"""Which outputs of stages are not sent, since no other rank needs them."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ...scheduler.ranks.stages import RankStages


class KeptBack:
    """What the running micro-batch does not need of the last block and of the head, on
    the ranks that do not own them: it is NaN there."""

    def __init__(self, stages: RankStages) -> None:
        self._stages = stages
        self._stays: ContextVar[int | None] = ContextVar("stays", default=None)
        """The last stage whose output is kept back; the first one is the last block."""
        self._only_logits: ContextVar[bool] = ContextVar("only_logits", default=False)

    @contextmanager
    def staying(self, *, with_head: bool = False) -> Iterator[None]:
        """Meanwhile the hidden states after the last block are not sent, and neither
        are logits `with_head`."""
        last = len(self._stages.owners) - 1 if with_head else self._stages.last_block
        token = self._stays.set(last)
        try:
            yield
        finally:
            self._stays.reset(token)

    def begin_forward(self, *, only_logits: bool) -> None:
        """A forward of the whole model begins. With `only_logits`, no rank needs more
        of it than the logits that it returns."""
        self._only_logits.set(only_logits and self._stages.has_head)

    def end_forward(self) -> bool:
        """It has ended, or failed. Returns whether this rank has only its logits."""
        is_part = self._only_logits.get() and not self._stages.is_own(-1)
        self._only_logits.set(False)
        return is_part

    def takers(self, stage: int) -> tuple[int, ...]:
        """The other ranks that get the output of `stage`."""
        last, stays = self._stages.last_block, self._stays.get()
        if stays is None and self._only_logits.get():
            stays = last
        if stays is not None and last <= stage <= stays:
            return ()
        return self._stages.takers(stage)
