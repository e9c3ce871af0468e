"""The ranks that share the model of a job. The first one reads, writes and resumes; the
others compute what it tells them."""

import logging
import multiprocessing
import signal
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from ...io.closing import Closing
from ...io.errors import MachineError, RanksError
from ...scheduler.ranks.lockstep import agreed
from ...scheduler.ranks.post import Post
from ..engine.engine import Engine
from ..engine.ranking import check_shareable
from ..files.parts import NumberedRows
from ..plans.ranked import RankGroup
from ..policy import Policy
from ..ranks.exchange import Exchange
from ..ranks.joining import LOCAL, RankEnvironment, connect, join, local_store
from ..ranks.remote_ranks import RemoteRanks, connection_of
from ..ranks.sameness import check_same
from ..reports.rank_record import RankRecord
from ..startup import hidden
from ..tasks.task import Task
from .budgets import divided, threads_of
from .computed import Loaded
from .rank_records import received_records, send_record
from .sharing import room_of
from .worker import Assignment, run_worker

_log = logging.getLogger("penstock")
_SPAWN = multiprocessing.get_context("spawn")
_SIGNALS = {signal.SIGINT, signal.SIGTERM}
_END_SECONDS = 10.0
_LOST_SECONDS = 0.5


class OtherRanks(Closing):
    """The other ranks of a job, in the process that has the first one.

    With a `post`, they have joined: torchrun has started them. Otherwise `begin` starts
    `num` - 1 processes of this machine.
    """

    def __init__(
        self,
        num: int = 1,
        post: Post | None = None,
        num_local: int | None = None,
        remote: RemoteRanks | None = None,
    ) -> None:
        self.remote = remote
        """Those of torchrun that gather weights; each has rows of its own."""
        self.num = num if post is None else post.num_ranks
        self.num_local = self.num if num_local is None else num_local
        self._post = post
        self._processes: list[BaseProcess] = []
        self._threads_before = torch.get_num_threads()

    def num_beside(self, workers: int) -> int:
        """The processes of this machine that compute, if there are `workers`."""
        return self.num_local if self.remote else max(workers, self.num_local)

    @property
    def num_threads(self) -> int:
        """The threads that each rank computes with."""
        return threads_of(self._threads_before, self.num_local)

    @property
    def group(self) -> RankGroup | None:
        """The ranks, as plans see them: on one machine, if not all have as many as
        this one. None for one process."""
        if self.num == 1:
            return None
        num_nodes, left = divmod(self.num, self.num_local)
        return RankGroup(self.num, 1 if left else num_nodes)

    def load(self, task: Task, model: Path, policy: Policy) -> Loaded:
        """The model for `task`: with other ranks, what this one has of it. They are
        told what to do."""
        if self.num == 1:
            return Loaded(model, policy, task.use)
        mode = policy.ranks or "pipeline"
        policy = policy.with_settings([f"ranks={mode}"])  # or it is refused now
        if self._post is None:
            check_shareable(model, policy, self.num)
            self._post = self._start(task, model)
        agreed(self._post, _as_json(policy))
        check_same(self._post, task.identity(), f"penstock {task.name}")
        torch.set_num_threads(self.num_threads)
        _log.warning(
            "%d ranks share the model; each of this machine computes with %d threads",
            self.num,
            self.num_threads,
        )
        own = _own(policy, model, self.num_local, 0)
        return Loaded(model, own, task.use, self._post)

    def records(self) -> Sequence[RankRecord]:
        """What the other ranks have counted and recorded, once all rows are done."""
        return () if self._post is None else received_records(self._post)

    def close(self) -> None:
        """Waits until the processes that were started have ended, or ends them."""
        torch.set_num_threads(self._threads_before)
        if self.remote is not None:
            self.remote.close()
        if self._post is not None:
            self._post.close()
        is_lost = self._post is not None and self._post.mail.lost
        for process in self._processes:
            process.join(_LOST_SECONDS if is_lost else _END_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        self._processes.clear()

    def _start(self, task: Task, model: Path) -> Post:
        resource_tracker.ensure_running()
        store = local_store()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # they inherit it
        try:
            for rank in range(1, self.num):
                where = RankEnvironment(
                    rank, self.num, LOCAL, store.port, self.num, rank
                )
                args = (where, task, model, self.num_threads)
                name = f"penstock-rank-{rank}"
                process = _SPAWN.Process(target=_run_rank, args=args, name=name)
                process.start()
                self._processes.append(process)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        where = RankEnvironment(0, self.num, LOCAL, store.port, self.num)
        return join(where, store=store, check=self._check)

    def _check(self) -> None:
        """Raises MachineError if a process has died."""
        for process in self._processes:
            if process.exitcode is not None:
                raise MachineError(
                    f"{process.name} ended with exit code {process.exitcode} while it "
                    "began: if memory ran out (see dmesg), take fewer ranks"
                )


def lead(engine: Engine, parts: Iterator[NumberedRows]) -> Iterator[NumberedRows]:
    """Yields `parts`, and gives each to the other ranks, if there are any."""
    exchange = engine.exchange
    for part in parts:
        if exchange is not None:
            part = list(part)
            exchange.agree([[number, dict(row)] for number, row in part])
        yield part
    if exchange is not None:
        exchange.agree(None)


def follow(post: Post, task: Task, model: Path, where: RankEnvironment) -> None:
    """Computes what the first rank tells, until it says that all is done."""
    try:
        told = agreed(post, None)
    except RanksError:
        return  # there was nothing to do, or the first rank says why
    check_same(post, task.identity(), f"penstock {task.name}")
    policy = _own(Policy.of(told), model, where.num_local, where.local_rank)
    with Loaded(model, policy, task.use, post) as loaded:
        exchange = loaded.engine.exchange
        assert exchange is not None, "several ranks share it"
        parts = _followed(exchange)
        progress = task.new_progress()
        for _ in task.results(loaded.model, loaded.tokenizer, parts, progress):
            pass  # the first rank writes it
        send_record(post, loaded.computed(progress))


def joined_ranks(task: Task, model: Path, policy: Policy) -> OtherRanks | None:
    """The ranks that torchrun has started. None on all but the first one, which this
    process has followed until the end."""
    where = RankEnvironment.found()
    if where is None or where.is_alone:
        return OtherRanks()
    options = {**task.identity(), **_as_json(policy)}
    same = {key: f"{value}" for key, value in options.items()}
    if policy.ranks == "gather":
        if where.rank == 0:
            remote = RemoteRanks(where, same)
            return OtherRanks(num_local=where.num_local, remote=remote)
        _serve(where, model, type(task), same)
        return None
    post = join(where, same=same)
    if where.rank == 0:
        return OtherRanks(post=post, num_local=where.num_local)
    torch.set_num_threads(threads_of(torch.get_num_threads(), where.num_local))
    _followed_to_the_end(post, task, model, where)
    return None


def _serve(
    where: RankEnvironment, model: Path, kind: type[Task], same: Mapping[str, str]
) -> None:
    """Computes the rows that the first rank hands out, until it says that all is
    done."""
    peers, _ = connect(where, way="rows", same=same)
    first = connection_of(peers.pop(0), [kind])
    for peer in peers.values():
        peer.close()
    with first:
        try:
            told: Assignment = first.recv()
        except (EOFError, OSError):
            return  # there was nothing to do, or the first rank says why
        own = _own(told.policy, model, where.num_local, where.local_rank)
        threads = threads_of(torch.get_num_threads(), where.num_local)
        lost = (
            f"penstock: error: rank {where.rank} of {where.num_ranks} has lost the "
            "first rank: that one says why the job has ended; what is done stays: run "
            "the same command again"
        )
        run_worker(first, Assignment(told.task, model, own, threads, where=where), lost)


def num_started() -> int:
    """The number of ranks that torchrun has started; 1 where it has not."""
    where = RankEnvironment.found()
    return 1 if where is None else where.num_ranks


def _followed(exchange: Exchange) -> Iterator[NumberedRows]:
    while (part := exchange.agree(None)) is not None:
        yield [(number, row) for number, row in part]


def _followed_to_the_end(
    post: Post, task: Task, model: Path, where: RankEnvironment
) -> None:
    try:
        follow(post, task, model, where)
    except BaseException as error:
        post.close(str(error) or type(error).__name__)
        raise
    post.close()


def _run_rank(
    where: RankEnvironment, task: Task, model: Path, num_threads: int
) -> None:
    """The main function of a process that `OtherRanks` has started."""
    torch.set_num_threads(num_threads)
    logger = logging.getLogger("penstock")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False  # the first rank says the same
    with hidden():
        try:
            post = join(where, check=_check_parent)
            _followed_to_the_end(post, task, model, where)
        except Exception:
            raise SystemExit(RanksError.exit_code) from None


def _check_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise RanksError("the first rank was killed while this one began")


def _own(policy: Policy, model: Path, num_local: int, local_rank: int) -> Policy:
    """The policy of one of `num_local` ranks that share this machine."""
    if num_local == 1:
        return policy
    return divided(policy, num_local, room_of(model, policy)).policies[local_rank]


def _as_json(policy: Policy) -> Mapping[str, Any]:
    found: Mapping[str, Any] = policy.model_dump(mode="json", exclude_unset=True)
    return found
