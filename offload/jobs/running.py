"""Hands the rows of parts to a task, and its results to an output."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from ...io.closing import Closing
from ...io.errors import InputError
from ..files.json_rows import failed_line, line_of
from ..files.parts import Cut, OutputPart, PartRecord

_MOST_WRITES = 4


class Taker(Protocol):
    """What takes the results of parts."""

    def known(self, part: OutputPart) -> OutputPart:
        """`part` with the results that need not be computed again."""
        ...

    def write(self, part: OutputPart, lines: Sequence[bytes], num_errors: int) -> None:
        """Takes the results of a part. Called on one thread at a time."""
        ...


class Output(Taker, Protocol):
    """A job's output: what it takes and what it has already."""

    is_kept: bool
    """Whether results are kept, so that the job can go on after a stop."""

    @property
    def cut(self) -> Cut:
        """How rows are cut into parts."""
        ...

    @property
    def done(self) -> Mapping[int, PartRecord]:
        """The parts that are done, by number."""
        ...

    @property
    def redo(self) -> frozenset[int]:
        """The parts that are done but whose failed rows are computed again."""
        ...

    @property
    def is_input_doubtful(self) -> bool:
        """Whether the rows of parts that are done must be compared with the input."""
        ...

    @property
    def num_rows(self) -> int:
        """The rows that are done."""
        ...

    @property
    def num_errors(self) -> int:
        """How many of those rows are errors."""
        ...

    def finish(self) -> None:
        """Called when all parts are done."""
        ...


class PartsRun(Closing):
    """The parts that are being computed, between input and output. Results come in the
    order of rows; when a part has all of them, a thread makes lines of them and writes
    them.

    An InputError ends the parts as the end of the input would, so that parts before it
    are finished; `failure` has it then.
    """

    def __init__(self, parts: Iterable[OutputPart], output: Taker) -> None:
        self._parts = parts
        self._output = output
        self._under_way: deque[OutputPart] = deque()
        self._results: list[Mapping[str, Any]] = []
        self._writer = ThreadPoolExecutor(1, "penstock-output")
        self._writes: deque[Future[None]] = deque()
        self.failure: InputError | None = None

    def feed(self) -> Iterator[Sequence[tuple[int, Mapping[str, Any]]]]:
        """Yields the rows of each part that are left to compute, with their numbers."""
        try:
            for part in self._parts:
                part = self._output.known(part)
                self._under_way.append(part)
                yield part.numbered()
        except InputError as error:
            self.failure = error

    def take(self, result: Mapping[str, Any]) -> None:
        """Takes the result of the next row. Raises OutputError, also for parts written
        before."""
        self._results.append(result)
        part = self._under_way[0]
        if len(self._results) == len(part.rows) - len(part.known):
            self._under_way.popleft()
            results, self._results = self._results, []
            self._writes.append(self._writer.submit(self._write, part, results))
        while self._writes and (
            self._writes[0].done() or len(self._writes) > _MOST_WRITES
        ):
            self._writes.popleft().result()

    def take_all(self, results: Iterable[Mapping[str, Any]]) -> None:
        """Takes the results of all rows as they come, and waits until they are written.
        Raises OutputError."""
        for result in results:
            self.take(result)
        self.finish()

    def finish(self) -> None:
        """Waits until all results that were taken are written. Raises OutputError."""
        assert not self._under_way, "each row has a result"
        while self._writes:
            self._writes.popleft().result()

    def close(self) -> None:
        """Waits until the parts that have all their results are written."""
        self._writer.shutdown(wait=True)

    def _write(self, part: OutputPart, results: Sequence[Mapping[str, Any]]) -> None:
        """Writes a part. Runs on the writer's thread."""
        left = iter(results)
        lines: list[bytes] = []
        num_errors = 0
        for index in range(len(part.rows)):
            line = part.known.get(index)
            if line is None:
                result = next(left)
                line, is_error = _line(result)
                num_errors += is_error
            lines.append(line)
        self._output.write(part, lines, num_errors)


def _line(result: Mapping[str, Any]) -> tuple[bytes, bool]:
    """A result as a line, and whether it is an error. A result with a number that JSON
    does not have (such as NaN) becomes an error. Never raises."""
    try:
        return line_of(result), "error" in result
    except (ValueError, TypeError, RecursionError):
        message = "the result is not finite: the model's weights or its dtype overflow"
        return failed_line(result.get("id"), str(result.get("error", message))), True
