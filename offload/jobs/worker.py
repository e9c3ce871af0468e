"""A worker process of a job: it has a model of its own, and gets parts of rows from the
process that reads the input."""

import logging
import os
import pickle
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from ...io.closing import Closing
from ...io.errors import PenstockError, RanksError
from ...io.sharing.ring import Seat
from ..files.parts import OutputPart
from ..policy import Policy
from ..ranks.gathered_loads import GatheredLoads
from ..ranks.joining import RankEnvironment, join
from ..startup import hidden
from ..tasks.task import Task
from ..tasks.task_progress import TaskProgress
from .computed import Loaded
from .running import PartsRun

_LOOK_SECONDS = 0.5
_ORPHANED = 70


@dataclass(frozen=True, slots=True)
class Assignment:
    """The work of one process."""

    task: Task
    model: Path
    policy: Policy
    num_threads: int
    """The threads that torch uses for matrix products."""
    seat: Seat | None = None
    """Where it shares what it reads with the others; None: it reads all itself."""
    where: RankEnvironment | None = None
    """Which rank the process is, if all of them read each unit together."""


class WorkerPipe(Closing):
    """The worker's end of its connection. Any thread may send, one receives. When the
    other end closes, the process ends at once, whatever it is doing, and says `lost`,
    if that is given."""

    def __init__(self, connection: Connection, lost: str | None = None) -> None:
        self._connection = connection
        self._lost = lost
        self._lock = threading.Lock()
        self._parts: SimpleQueue[OutputPart | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def send(self, kind: str, *values: Any) -> None:
        with self._lock:
            self._connection.send((kind, *values))

    def parts(self) -> Iterator[OutputPart]:
        """Yields parts. Each is asked for when it is needed."""
        while True:
            self.send("want")
            part = self._parts.get()
            if part is None:
                return
            yield part

    def close(self) -> None:
        """Waits until the other end has received everything and says so."""
        self.send("bye")
        self._thread.join()

    def _receive(self) -> None:
        while True:
            try:
                part = self._connection.recv()
            except (EOFError, OSError):
                if self._lost is None:
                    os._exit(_ORPHANED)
                print(self._lost, file=sys.stderr, flush=True)
                os._exit(RanksError.exit_code)
            if part == "bye":
                return
            self._parts.put(part)


class _Handed:
    """Sends results of parts to the process that writes them."""

    def __init__(
        self, link: WorkerPipe, loaded: Loaded, progress: TaskProgress
    ) -> None:
        self._link = link
        self._loaded = loaded
        self._progress = progress

    def known(self, part: OutputPart) -> OutputPart:
        return part

    def write(self, part: OutputPart, lines: Sequence[bytes], num_errors: int) -> None:
        counted = self._loaded.counted(self._progress)
        self._link.send("done", part.number, list(lines), num_errors, counted)


class _Looks(Closing):
    """Sends a snapshot of the model a few times a second, on a thread of its own."""

    def __init__(
        self, link: WorkerPipe, loaded: Loaded, progress: TaskProgress
    ) -> None:
        self._is_over = threading.Event()

        def tell() -> None:
            while not self._is_over.wait(_LOOK_SECONDS):
                link.send("look", loaded.look(progress))

        self._thread = threading.Thread(target=tell, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()


class _Announcements(logging.Handler):
    """Sends log messages to the process that has the terminal."""

    def __init__(self, link: WorkerPipe) -> None:
        super().__init__()
        self._link = link

    def emit(self, record: logging.LogRecord) -> None:
        self._link.send("log", record.levelno, record.getMessage())


def run_worker(
    connection: Connection, assignment: Assignment, lost: str | None = None
) -> None:
    """The main function of a worker process. It sends `ready` when the model is loaded,
    `want` for a part, `done` with a part's results, `look` with a snapshot and `log`
    with a message; at the end `computed`, or `failed` with the error; then `bye`, which
    is answered. When the other end closes before, it says `lost`."""
    torch.set_num_threads(assignment.num_threads)
    with WorkerPipe(connection, lost) as link:
        logger = logging.getLogger("penstock")
        logger.addHandler(_Announcements(link))
        logger.propagate = False
        try:
            with hidden():
                _compute(link, assignment)
        except BaseException as error:
            link.send("failed", portable(error))


def _compute(link: WorkerPipe, assignment: Assignment) -> None:
    task, progress = assignment.task, assignment.task.new_progress()
    post = None if assignment.where is None else join(assignment.where)
    with Loaded(
        assignment.model, assignment.policy, task.use, post, seat=assignment.seat
    ) as loaded:
        link.send("ready")
        parts = awaited(link.parts(), loaded.engine.gathered)
        with (
            _Looks(link, loaded, progress),
            PartsRun(parts, _Handed(link, loaded, progress)) as run,
        ):
            model, tokenizer = loaded.model, loaded.tokenizer
            run.take_all(task.results(model, tokenizer, run.feed(), progress))
        link.send("look", loaded.look(progress))
        link.send("computed", loaded.computed(progress))


def awaited(
    parts: Iterator[OutputPart], gathered: GatheredLoads | None
) -> Iterator[OutputPart]:
    """Yields `parts`. While a rank waits for one, the others do not wait for it."""
    while True:
        with nullcontext() if gathered is None else gathered.resting():
            part = next(parts, None)
        if part is None:
            return
        yield part


def portable(error: BaseException) -> BaseException:
    """`error` if it can be pickled; else a PenstockError with its type and message."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return PenstockError(f"{type(error).__name__}: {error}")
    return error
