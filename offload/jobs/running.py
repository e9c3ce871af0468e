"""Hands parts to the work that is to be done with them, and their results on."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from ...io.closing import Closing
from ...io.errors import InputError
from ..files.jsonl import failed_line, line_of
from ..files.parts import Cut, OutputPart, PartRecord

_MOST_WRITES = 4


class Taker(Protocol):
    """Where the results of parts go."""

    def known(self, part: OutputPart) -> OutputPart:
        """`part` with those results that need not be made again."""
        ...

    def write(self, part: OutputPart, lines: Sequence[bytes], num_errors: int) -> None:
        """Takes the results of a part. Called on one thread at a time."""
        ...


class Output(Taker, Protocol):
    """Where a job's results go, and what is there already."""

    is_kept: bool
    """Whether the job can be gone on with after it was ended."""

    @property
    def cut(self) -> Cut:
        """How rows are cut into parts."""
        ...

    @property
    def done(self) -> Mapping[int, PartRecord]:
        """Parts that are done, by number."""
        ...

    @property
    def redo(self) -> frozenset[int]:
        """Those of them whose failed rows are to be done again."""
        ...

    @property
    def is_input_doubtful(self) -> bool:
        """Whether rows that were done must be compared with those of the input."""
        ...

    @property
    def num_rows(self) -> int:
        """That are done."""
        ...

    @property
    def num_errors(self) -> int:
        """Rows that failed, among those."""
        ...

    def finish(self) -> None:
        """All parts are done."""
        ...


class PartsRun(Closing):
    """The parts under way between input and output. Results come in the order of rows;
    a thread makes lines of those of a part, once it has all, and writes them.

    An InputError ends the parts as the input's end would, so that those before it are
    done; it stands in `failure` then.
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
        """The rows of each part that are left to do."""
        try:
            for part in self._parts:
                part = self._output.known(part)
                self._under_way.append(part)
                yield part.numbered()
        except InputError as error:
            self.failure = error

    def take(self, result: Mapping[str, Any]) -> None:
        """The next row's result. Raises OutputError, also of parts before."""
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
        """Takes all rows' results, as they come, and waits until they are written.
        Raises OutputError."""
        for result in results:
            self.take(result)
        self.finish()

    def finish(self) -> None:
        """All results were taken: waits until they are written."""
        assert not self._under_way, "each row has a result"
        while self._writes:
            self._writes.popleft().result()

    def close(self) -> None:
        """Writes the parts that are whole, whatever became of the others."""
        self._writer.shutdown(wait=True)

    def _write(self, part: OutputPart, results: Sequence[Mapping[str, Any]]) -> None:
        """On the writer's thread."""
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
    """A result as a line, and whether it is an error: that it has a number which JSON
    has not, for one. Never fails."""
    try:
        return line_of(result), "error" in result
    except (ValueError, TypeError, RecursionError):
        message = "the result is not finite: the model's weights or its dtype overflow"
        return failed_line(result.get("id"), str(result.get("error", message))), True
