"""Sends the outputs of this rank's stages, and waits for those of other ranks."""

import time
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from ...io.closing import Closing
from ...io.devices.crossing import Crossing
from ...io.errors import PenstockError, RanksError, UsageError, readable
from ...scheduler.ranks.lockstep import Lockstep, agreed
from ...scheduler.ranks.messages import Kind, Message
from ...scheduler.ranks.post import Post
from ...scheduler.ranks.rank_statistics import RankStatistics
from ...scheduler.ranks.stages import EMBEDDING, PLAIN, Address, CallState, RankStages
from ...scheduler.ranks.unison import Unison
from ...scheduler.sweep.entry import ForwardEntry
from ...scheduler.sweep.ranked_loop import RankedLoop
from ..weights.placeholder import StreamedParameter
from .kept_back import KeptBack
from .outputs import diverged, fingerprint, returned, sendable

CHECKS = 4
"""The first calls of a stage are looked at: what the model's own code does between
blocks is the same in all calls."""


class Exchange(Closing):
    """The calls that a model's stages get on this rank.

    Every rank runs the caller's function and the model's own Python code. A stage that
    another rank computes gives the output that this rank sends; where nobody here needs
    that, it gives NaNs of its shape. `crossing` copies what is sent, and what comes.
    `close` closes the post.
    """

    def __init__(
        self,
        post: Post,
        stages: RankStages,
        crossing: Crossing,
        blocks: Sequence[nn.Module],
    ) -> None:
        self.stages = stages
        self.blocks = blocks
        """Those of all ranks."""
        self._post = post
        self._crossing = crossing
        post.empty = crossing.empty
        self._entry: ForwardEntry | None = None
        self._plain = CallState(PLAIN, 0)
        self._num_runs = 0
        self._checks_left = {
            stage: CHECKS
            for stage in range(len(stages.owners))
            if stages.is_own(stage) and stage != EMBEDDING
        }
        self.kept_back = KeptBack(stages)
        self._is_on_head: ContextVar[bool] = ContextVar("is_on_head", default=False)
        self._bytes_sent = 0
        self._num_sent = 0

    def attach(self, entry: ForwardEntry) -> None:
        """The forwards of the model pass `entry`."""
        self._entry = entry

    def new_run(self) -> Lockstep | Unison:
        """What keeps the next run of a sweep in step with that of other ranks."""
        self._num_runs += 1
        return Lockstep(self._post, self.stages, self._num_runs)

    def agree(self, value: Any) -> Any:
        """The first rank's `value`, which JSON can hold, on all ranks: all make their
        calls of this in the same order."""
        return agreed(self._post, value)

    @property
    def is_head_owner(self) -> bool:
        return self.stages.head_owner == self._post.rank

    def on_head(
        self, compute: Callable[[], torch.Tensor], *, on_host: bool = False
    ) -> torch.Tensor:
        """Returns `compute()` on all ranks; only the head's owner calls it. With
        `on_host` it is in host memory: the micro-batch waits for it, not the host."""
        state, source = self._state(), self.stages.head_owner
        address, stage = state.count(), self.stages.last_block
        if source != self._post.rank:
            output = self._receive(state, address, source, stage, on_host)
            assert isinstance(output, torch.Tensor), "it was sent as one"
            return output
        token = self._is_on_head.set(True)
        try:
            found = compute()
        except Exception as error:
            self._fail(state, address, error)
            raise
        finally:
            self._is_on_head.reset(token)
        is_late = on_host and self._crossing.is_copied
        takers = (*self._others, source) if is_late else self._others
        self._send(state, address, stage, found, takers)
        if not is_late:
            return found
        here = self._receive(state, address, source, stage, on_host)
        assert isinstance(here, torch.Tensor), "it was sent as one"
        return here

    # Called by StageHooks.

    def note_inputs(self, given: Iterable[Any]) -> None:
        """A forward is `given` other inputs than token ids."""
        tensors = (value for value in given if isinstance(value, torch.Tensor))
        if (first := next(tensors, None)) is not None:
            self._state().fingerprint = fingerprint(first)

    def enters(self, stage: int, ids: torch.Tensor | None = None) -> Address | None:
        """`stage`, which is this rank's, is called. Returns its address; None if that
        is nothing to other ranks."""
        if self._is_on_head.get():
            return None
        state = self._state()
        if ids is not None:
            state.fingerprint = fingerprint(ids)
        return state.enter(stage)

    def check_inputs(self, stage: int, given: Iterable[Any]) -> None:
        """Raises UsageError if `stage` is given what only another rank has: NaNs that
        did not come from the stage before. Its first calls are looked at: on an
        accelerator, the host waits there."""
        if not self._checks_left.get(stage):
            return
        self._checks_left[stage] -= 1
        if self._is_on_head.get() or self._state().has_nan:
            return
        for value in given:
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                continue
            if not isinstance(value, StreamedParameter) and value.isnan().any():
                raise UsageError(
                    f"ranks cannot share this model: its code before stage {stage} "
                    "uses what an earlier block made, which only another rank has; run "
                    "it on one rank"
                )

    def leaves(self, stage: int, address: Address, output: Any) -> None:
        """`stage` has returned `output`. Raises UsageError for one that cannot be
        sent."""
        first = output[0] if isinstance(output, (tuple, list)) else output
        if isinstance(first, torch.Tensor) and stage <= self.stages.last_block:
            self._look(self._state(), stage, first)
        takers = self.kept_back.takers(stage)
        if takers:
            self._send(self._state(), address, stage, output, takers)

    def fails(self, stage: int, address: Address, error: BaseException) -> None:
        """`stage` has raised `error`."""
        if isinstance(error, Exception):
            self._fail(self._state(), address, error)

    def call_elsewhere(
        self, stage: int, shape: torch.Size, dtype: torch.dtype, given: torch.Tensor
    ) -> Any:
        """The output of `stage`, which another rank computes. `shape` and `dtype` are
        those of its first tensor."""
        state = self._state()
        if stage == 0:
            state.fingerprint = fingerprint(given)
        address = state.enter(stage)
        source = self.stages.owners[stage]
        if self._post.rank not in self.kept_back.takers(stage):
            nothing = torch.full(shape, torch.nan, dtype=dtype, device=given.device)
            kinds = self.stages.returned_by(stage) or ""
            return returned(nothing, kinds, stage, source)
        output = self._receive(state, address, source, stage)
        first = output[0] if isinstance(output, (tuple, list)) else output
        if first.shape != shape:  # inputs are the same, or it would not be received
            raise UsageError(
                f"ranks cannot share this model: block {stage - 1} makes "
                f"{tuple(first.shape)} numbers of {tuple(shape)}; run it on one rank"
            )
        return output

    def statistics(self) -> RankStatistics:
        return RankStatistics(
            num_ranks=self._post.num_ranks,
            bytes_sent=self._bytes_sent,
            num_sent=self._num_sent,
            wait_seconds=0.0 if self._entry is None else self._entry.rank_seconds,
        )

    @property
    def close(self) -> Callable[[], None]:
        """Ends the messages. It does not refer to the model, which a block that waits
        here would be kept alive by."""
        return self._post.close

    @property
    def _others(self) -> tuple[int, ...]:
        ranks = range(self._post.num_ranks)
        return tuple(rank for rank in ranks if rank != self._post.rank)

    def _loop(self) -> RankedLoop | None:
        assert self._entry is not None, "it is attached before forwards run"
        loop = self._entry.loop_here()
        return loop if isinstance(loop, RankedLoop) else None

    def _state(self) -> CallState:
        loop = self._loop()
        return self._plain if loop is None else loop.state

    def _look(self, state: CallState, stage: int, output: torch.Tensor) -> None:
        """Notes for `check_inputs` of the next stage whether `output` has NaNs."""
        is_checked = bool(self._checks_left.get(stage + 1))
        state.has_nan = is_checked and bool(output.isnan().any())

    def _receive(
        self,
        state: CallState,
        address: Address,
        source: int,
        stage: int,
        on_host: bool = False,
    ) -> Any:
        mail = self._post.mail
        self._post.collect()
        if not mail.is_ready(address, source):
            loop = self._loop()
            if loop is not None:
                loop.await_message(address, source)
            else:
                self._wait_plainly(address, source)
        try:
            message = mail.take(address, source)
        except RanksError:
            raise
        except Exception:
            state.begin_again()
            raise
        if message.stage != stage or message.fingerprint != state.fingerprint:
            raise diverged(
                f"rank {source} sent stage {message.stage} of a forward of other token "
                f"ids than stage {stage} here"
                if message.stage == stage
                else f"rank {source} is at stage {message.stage}, and this one at "
                f"stage {stage}"
            )
        found = message.tensor
        self._look(state, stage, found)
        if not on_host:
            found = self._crossing.to_device(found)
        return returned(found, message.text, stage, source)

    def _wait_plainly(self, address: Address, source: int) -> None:
        """Waits outside of a sweep."""
        assert self._entry is not None, "it is attached before forwards run"
        start = time.perf_counter()
        self._post.wait(lambda: self._post.mail.is_ready(address, source))
        self._entry.rank_seconds += time.perf_counter() - start

    def _send(
        self,
        state: CallState,
        address: Address,
        stage: int,
        output: Any,
        takers: tuple[int, ...],
    ) -> None:
        first, kinds = sendable(output, stage)
        copy = self._crossing.to_host(first.detach())
        message = Message(Kind.OUTPUT, address, stage, state.fingerprint, kinds, copy)
        for rank in takers:
            self._post.send(rank, message)
        num = sum(rank != self._post.rank for rank in takers)
        self._num_sent += num
        self._bytes_sent += num * first.nbytes

    def _fail(self, state: CallState, address: Address, error: Exception) -> None:
        if isinstance(error, RanksError) or address.attempt < state.attempt:
            return  # the others know
        is_ours = isinstance(error, PenstockError)
        text = str(error) if is_ours else f"{type(error).__name__}: {error}"
        message = Message(Kind.ERROR, address, int(is_ours), text=readable(text))
        for rank in self._others:
            self._post.send(rank, message)
        state.begin_again()
