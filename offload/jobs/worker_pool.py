"""The processes that share a job. Each has a model of its own and takes the next part
when it is free; this process reads the parts and writes their results."""

import logging
import multiprocessing
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from ...io.closing import Closing
from ...io.errors import InputError, MachineError, RanksError
from ..files.parts import OutputPart
from ..monitoring.stopped_workers import LOOK_SECONDS, StoppedWorkers
from ..ranks.remote_ranks import RemoteRank
from .running import Output

_log = logging.getLogger("penstock")
MOST_DEATHS = 3
"""How many processes may die with the same part, or before they have any, until the job
fails."""
_SPAWN = multiprocessing.get_context("spawn")
_SIGNALS = {signal.SIGINT, signal.SIGTERM}


class WorkerPool(Closing):
    """Runs a process for each of `targets`, which is called there with a connection and
    speaks as `run_worker` does, and a thread here for each connection. A remote rank
    has a process already.

    A process that dies, or is stopped for long, is replaced, and its parts are computed
    again. Where nothing is
    kept (standard output), results are written in order, and workers wait for one that
    is far behind. With `are_ranks`, processes need each other: if one dies, that is an
    error. An InputError ends the parts as the end of the input would; `failure`
    has it then. Closing kills processes that still run.
    """

    def __init__(
        self,
        targets: Sequence[Callable[[Connection], None] | RemoteRank],
        parts: Iterable[OutputPart],
        output: Output,
        *,
        are_ranks: bool = False,
    ) -> None:
        self._targets = targets
        self._are_ranks = are_ranks
        self._parts = iter(parts)
        self._output = output
        self.failure: InputError | None = None
        self.looks: dict[int, Any] = {}
        """The last snapshot of each process, by its number among all that were
        started."""
        self.num_handed: Counter[int] = Counter()
        """The rows that each process handed in."""
        self.dead: set[int] = set()
        """The processes that died."""
        self.counted: dict[int, Any] = {}
        """What each process had counted when it last handed in a part, or at its end.
        Processes that died come first."""
        self.num_rows = 0
        """The rows that were computed and written."""
        self.num_errors = 0
        """How many of those rows are errors."""
        self._changed = threading.Condition()
        self._reading = threading.Lock()
        self._again: deque[OutputPart] = deque()
        self._deaths: Counter[int | None] = Counter()
        self._next_number: deque[int] = deque()
        self._waiting: dict[int, tuple[OutputPart, Sequence[bytes], int]] = {}
        self._processes: dict[int, BaseProcess | RemoteRank] = {}
        self._num_begun = 0
        self._said: set[str] = set()
        self._stopped = StoppedWorkers()
        self._is_ready = threading.Event()
        self._is_closed = False
        # First: starting it on a thread unblocks the signals that `_serve` blocks.
        resource_tracker.ensure_running()
        self._threads = ThreadPoolExecutor(len(targets), "penstock-worker")
        self._served: list[Future[None]] = []

    def start(self) -> None:
        """Starts the processes, and waits until one of them has loaded its model or
        failed."""
        for index in range(len(self._targets)):
            self._served.append(self._threads.submit(self._serve, index))
            self._served[-1].add_done_callback(lambda _: self._is_ready.set())
        while not self._is_ready.wait(LOOK_SECONDS):
            self._end_stopped()

    def finish(self) -> None:
        """Waits until all parts are written. Raises what a worker raised, or
        MachineError where processes die again and again."""
        found = wait(self._served, LOOK_SECONDS, FIRST_EXCEPTION)
        while found.not_done and not any(one.exception() for one in found.done):
            self._end_stopped()
            found = wait(self._served, LOOK_SECONDS, FIRST_EXCEPTION)
        for one in self._served:
            if one.done():
                one.result()

    def _end_stopped(self) -> None:
        """Kills workers that are stopped for long. Ranks look after each other."""
        with self._changed:
            workers = {
                one.pid: one
                for one in self._processes.values()
                if isinstance(one, BaseProcess) and one.pid and not self._are_ranks
            }
            for pid in self._stopped.look(workers):
                workers[pid].kill()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            for process in self._processes.values():
                process.kill()
            self._changed.notify_all()
        self._threads.shutdown(wait=True)

    def _serve(self, index: int) -> None:
        """Starts a worker, and another where it dies. Runs on a thread for each
        worker."""
        # Worker processes inherit it: only this process is to be stopped by signals.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        while not self._is_closed:
            mine, theirs, process = self._open(index)
            held: dict[int, OutputPart] = {}
            with mine:
                with theirs:
                    place = self._begin(process)
                try:
                    self._listen(place, mine, held)
                    return
                except (EOFError, ConnectionError):
                    pass  # it died
                finally:
                    code = self._end(place, process)
            self._bury(place, code, held)

    def _open(
        self, index: int
    ) -> tuple[Connection, AbstractContextManager[object], BaseProcess | RemoteRank]:
        """A connection to a worker, the worker's end of it, and the worker."""
        target = self._targets[index]
        if isinstance(target, RemoteRank):
            return target.connection, nullcontext(), target
        mine, theirs = _SPAWN.Pipe()
        name = f"penstock-{index}"
        return mine, theirs, _SPAWN.Process(target=target, args=(theirs,), name=name)

    def _begin(self, process: BaseProcess | RemoteRank) -> int:
        with self._changed:
            place, self._num_begun = self._num_begun, self._num_begun + 1
            process.start()
            self._processes[place] = process
            if self._is_closed:
                process.kill()
        return place

    def _end(self, place: int, process: BaseProcess | RemoteRank) -> int | None:
        """Ends a process that has nothing more to say. Returns its exit code."""
        with self._changed:  # starting a process polls the others, this one too
            process.kill()
            process.join()
            del self._processes[place]
            code = process.exitcode
            process.close()
        return code

    def _listen(
        self, place: int, mine: Connection, held: dict[int, OutputPart]
    ) -> None:
        """Answers a worker until it says `bye`. Raises EOFError where it dies."""
        while True:
            kind, *values = _received(mine)
            if kind == "want":
                part = self._next_part()
                if part is not None:
                    held[part.number] = part
                mine.send(part)
            elif kind == "done":
                number, lines, num_errors, counted = values
                self.counted[place] = counted
                part = held.pop(number)
                self._take(part, lines, num_errors)
                self.num_handed[place] += len(part.rows) - len(part.known)
            elif kind == "look":
                self.looks[place] = values[0]
            elif kind == "ready":
                self._is_ready.set()
            elif kind == "log":
                self._say(*values)
            elif kind == "computed":
                self.counted.pop(place, None)  # so that it comes last
                self.counted[place] = values[0]
            elif kind == "failed":
                raise values[0]
            else:
                assert kind == "bye", f"a worker said {kind!r}"
                mine.send("bye")
                return

    def _next_part(self) -> OutputPart | None:
        """The next part for a worker; None where there are no more."""
        with self._changed:
            while len(self._waiting) > 2 * len(self._targets) and not self._again:
                if self._is_closed:
                    return None
                self._changed.wait()
            if self._again:
                return self._again.popleft()
        with self._reading:
            try:
                part = next(self._parts, None) if self.failure is None else None
            except InputError as error:
                self.failure = error
                return None
            if part is None:
                return None
            part = self._output.known(part)
            with self._changed:
                self._next_number.append(part.number)
            return part

    def _take(self, part: OutputPart, lines: Sequence[bytes], num_errors: int) -> None:
        with self._changed:
            self._waiting[part.number] = part, lines, num_errors
            while self._waiting:
                number = part.number
                if not self._output.is_kept:
                    number = self._next_number[0]
                if number not in self._waiting:
                    break
                self._next_number.remove(number)
                part, lines, num_errors = self._waiting.pop(number)
                self._output.write(part, lines, num_errors)
                self.num_rows += len(lines) - len(part.known)
                self.num_errors += num_errors
            self._changed.notify_all()

    def _bury(self, place: int, code: int | None, held: dict[int, OutputPart]) -> None:
        """Has the parts of a process that died computed again. Raises MachineError
        where too many died with one part."""
        with self._changed:
            if self._is_closed:
                return
            self._again.extend(held[number] for number in sorted(held))
            causes: list[int | None] = [*held] or [None]
            self._deaths.update(causes)
            worst = max(self._deaths[cause] for cause in causes)
            self.dead.add(place)
            self._changed.notify_all()
        how = f"ended with exit code {code}" if code is not None else "is gone"
        if code is not None and code < 0:
            how = f"was killed by signal {-code}"
        rows = "while it began"
        if held:
            parts = [held[number] for number in sorted(held)]
            last = parts[-1].first_row + len(parts[-1].rows)
            rows = f"with rows {parts[0].first_row + 1:,} to {last:,}"
        if self._are_ranks:
            raise RanksError(
                f"a rank {how} {rows}, and the others need what it reads: if memory "
                "ran out (see dmesg), take fewer ranks; what is done stays: run the "
                "same command again"
            )
        if worst >= MOST_DEATHS:
            raise MachineError(
                f"a worker {how} {rows}, as {worst - 1} did before: if memory ran out "
                "(see dmesg), take fewer workers, a smaller device_memory or fewer "
                "tokens in flight; what is done stays"
            )
        _log.warning("a worker %s %s: another one is begun", how, rows)

    def _say(self, level: int, message: str) -> None:
        """Logs `message`, once for all workers."""
        with self._changed:
            if message in self._said:
                return
            self._said.add(message)
        _log.log(level, message)


def _received(mine: Connection) -> Any:
    """What a worker says. Raises EOFError where it died, also in the middle of it."""
    try:
        return mine.recv()
    except OSError as error:
        raise EOFError(str(error)) from error
