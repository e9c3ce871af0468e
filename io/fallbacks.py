"""What could not be had as it was asked for: announced once, and remembered."""

import logging
import threading
from collections.abc import Iterator

_log = logging.getLogger("penstock")


class Fallbacks:
    """Sentences, in the order in which they were announced. All parts of a streamed
    model share one; any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sentences: dict[str, None] = {}

    def __repr__(self) -> str:
        return f"<Fallbacks: {len(self._sentences)} announced>"

    def __iter__(self) -> Iterator[str]:
        with self._lock:  # another thread may announce one meanwhile
            return iter(tuple(self._sentences))

    def announce(self, sentence: str | None) -> None:
        """Logs `sentence` as a warning, the first time that it comes. None, from a part
        that had what it asked for, is ignored."""
        if sentence is None:
            return
        with self._lock:
            is_new = sentence not in self._sentences
            self._sentences[sentence] = None
        if is_new:
            _log.warning("%s", sentence)
