"""What micro-batches have found and what is still on its way from the device."""

from collections import deque
from collections.abc import Callable

from ...io.devices.host_copy import Finding
from ...io.errors import PenstockError

Done = Callable[[Exception | None], None]


class Findings:
    """Takes findings in the order in which they were added, as they arrive.

    At most `most` are left on their way. They should be as many as micro-batches share
    a pass: then a finding that has to be waited for has a pass of work queued behind
    it, so that the device does not idle meanwhile.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._coming: deque[tuple[Finding, Done]] = deque()

    def add(self, finding: Finding, done: Done) -> None:
        """`done` is called once `finding` was taken, with the error that this raised if
        it failed. On the CPU that is now."""
        self._coming.append((finding, done))
        self.take()

    def take(self) -> None:
        """Takes the findings that have arrived, and those that are too many."""
        while self._coming and (
            self._coming[0][0].has_arrived or len(self._coming) > self._most
        ):
            self._take_first()

    def finish(self) -> None:
        """Takes all findings. Waits once: the last one arrives behind the others."""
        if self._coming:
            for copy in self._coming[-1][0].copies[-1:]:
                copy.wait_quietly()
        while self._coming:
            self._take_first()

    def _take_first(self) -> None:
        finding, done = self._coming.popleft()
        try:
            finding.take()
        except PenstockError:
            raise
        except Exception as error:  # the device's work has failed
            done(error)
        else:
            done(None)
