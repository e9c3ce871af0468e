"""Messages between ranks over TCP."""

import queue
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress

from ...io.closing import Closing
from ...io.errors import readable
from ...scheduler.ranks.messages import Kind, Message
from ...scheduler.ranks.post import Empty, Mailbox, pageable
from .outbox import Outbox
from .silence import SILENT_SECONDS, Silence
from .stuck_watch import StuckWatch
from .wire import packed, unpacked

ALIVE_SECONDS = 0.5
"""How often a rank that has nothing to say says that it is there."""
STUCK_SECONDS = 3.0
"""After this long in which all ranks wait for each other, they have diverged."""
_CLOSE_SECONDS = 2.0
_FRESH = 3
"""What a rank said of itself counts for so many times `ALIVE_SECONDS`."""


class TcpPost(Closing):
    """The post of `rank`, with a connected socket to each other rank. A thread for each
    receives, and another one sends."""

    def __init__(
        self, rank: int, peers: Mapping[int, socket.socket], store: object = None
    ) -> None:
        self._store = store  # the others may still ask it where ranks are
        self.rank = rank
        self.num_ranks = len(peers) + 1
        self.mail = Mailbox()
        self.empty: Empty = pageable
        self._peers = dict(peers)
        self._outbox = Outbox(peers, self._receive_own, self.mail.lose)
        self._closed: set[int] = set()
        self._is_waiting = False
        self._num_sent: Counter[int] = Counter()
        """The messages of which each rank has got all bytes, as far as known here."""
        self._num_queued: Counter[int] = Counter()
        self._num_events = 0
        """The messages that were sent and received, those of `ALIVE` not counted."""
        self._stuck = StuckWatch(len(peers), ALIVE_SECONDS * _FRESH, STUCK_SECONDS)
        self._is_closing = threading.Event()
        self._senders: list[threading.Thread] = []
        self._receivers: list[threading.Thread] = []
        for peer in self._peers:
            self._senders.append(self._thread(self._send_all, peer))
            self._receivers.append(self._thread(self._receive_all, peer))
        for thread in (*self._senders, *self._receivers):
            thread.start()

    def _thread(self, work: Callable[[int], None], peer: int) -> threading.Thread:
        name = f"penstock-rank-{peer}"
        return threading.Thread(target=work, args=(peer,), name=name, daemon=True)

    def send(self, to: int, message: Message) -> None:
        if to not in self._closed:
            self._num_events += 1
            self._num_queued[to] += 1
            self._outbox.put(to, message)

    def collect(self) -> None:
        """Does nothing: threads receive."""

    def wait(self, test: Callable[[], bool], *, is_idle: bool = False) -> None:
        mail = self.mail

        def is_over() -> bool:
            return bool(mail.lost) or test()

        with mail.changed:
            self._is_waiting = not is_idle
            try:
                while not mail.changed.wait_for(is_over, ALIVE_SECONDS):
                    waits = self._is_waiting and self._num_queued == self._num_sent
                    if waits and self._stuck.is_stuck(self._num_events):
                        mail.lose(
                            "all ranks wait for each other, and no message is on its "
                            "way: they run different things; give all ranks the same "
                            "program and the same batches"
                        )
            finally:
                self._is_waiting = False

    def close(self, why: str = "") -> None:
        """Says to the others that nothing more comes, and ends the threads."""
        if self._is_closing.is_set():
            return
        self._is_closing.set()
        for peer in self._peers:
            if peer not in self._closed:
                self._outbox.put(peer, Message(Kind.BYE, text=readable(why)))
            self._outbox.end(peer)
        self._outbox.close()
        end = time.monotonic() + _CLOSE_SECONDS
        for thread in self._senders:
            thread.join(max(0.0, end - time.monotonic()))
        for one in self._peers.values():
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._receivers:
            if thread is not threading.current_thread():
                thread.join(_CLOSE_SECONDS)
        for one in self._peers.values():
            one.close()

    def _send_all(self, peer: int) -> None:
        messages, there = self._outbox.queues[peer], self._peers[peer]
        silence = Silence(peer, there)
        try:
            while True:
                is_message = True
                try:
                    pieces = messages.get(timeout=ALIVE_SECONDS)
                except queue.Empty:
                    pieces, is_message = packed(self._alive()), False
                if pieces is None:
                    return
                for piece in pieces:
                    _send(there, memoryview(piece), silence)
                self._num_sent[peer] += is_message
        except TimeoutError:
            self._lose(peer, f"it has taken nothing for {SILENT_SECONDS:.0f} seconds")
        except OSError as error:
            self._lose(peer, f"nothing can be sent to it ({error})")

    def _receive_all(self, peer: int) -> None:
        there = self._peers[peer]
        silence = Silence(peer, there)

        def receive(buffer: memoryview) -> None:
            while buffer:
                try:
                    num = there.recv_into(buffer)
                except TimeoutError as error:
                    silence.bear(error)
                    continue
                silence.is_over()
                if not num:
                    raise EOFError("it has ended, or was killed")
                buffer = buffer[num:]

        try:
            while True:
                message = unpacked(receive, self.empty)
                if message.kind is Kind.BYE:
                    self._closed.add(peer)
                if message.kind is Kind.ALIVE:
                    self._stuck.hear(peer, bool(message.stage), message.fingerprint)
                else:
                    self._num_events += 1
                    self.mail.deliver(peer, message)
        except TimeoutError:
            self._lose(
                peer,
                f"it has sent nothing for {SILENT_SECONDS:.0f} seconds: it is stopped, "
                "or its machine is",
            )
        except EOFError as error:
            self._lose(peer, str(error))
        except Exception as error:  # else nobody would hear that this thread has ended
            self._lose(peer, str(error) or type(error).__name__)

    def _receive_own(self, message: Message) -> None:
        self._num_sent[self.rank] += 1
        self.mail.deliver(self.rank, message)

    def _alive(self) -> Message:
        """Says also whether this rank waits, and how many messages it has had."""
        waits = self._is_waiting and self._num_queued == self._num_sent
        return Message(
            Kind.ALIVE, stage=int(waits), fingerprint=self._num_events % 2**32
        )

    def _lose(self, peer: int, why: str) -> None:
        if peer in self._closed or self._is_closing.is_set():
            return
        self.mail.lose(
            f"rank {peer} is gone: {why}; its own messages say more; what is done "
            "stays: run the same command again"
        )


def _send(there: socket.socket, piece: memoryview, silence: Silence) -> None:
    """Sends `piece`. Raises TimeoutError if nothing of it goes for some seconds:
    `sendall` would if all of it took that long."""
    silence.is_over()
    while piece:
        try:
            num = there.send(piece)
        except TimeoutError as error:
            silence.bear(error)
            continue
        silence.is_over()
        piece = piece[num:]
