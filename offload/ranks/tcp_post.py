"""Messages between ranks over TCP."""

import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from queue import Empty, SimpleQueue

from ...io.closing import Closing
from ...io.errors import readable
from ...scheduler.ranks.messages import Kind, Message
from ...scheduler.ranks.post import Mailbox
from .wire import Buffer, packed, unpacked

ALIVE_SECONDS = 0.5
"""How often a rank that has nothing to say says that it is there."""
SILENT_SECONDS = 4.0
"""After this long without a word, a rank counts as stopped."""
_CLOSE_SECONDS = 2.0


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
        self._peers = dict(peers)
        self._queues: dict[int, SimpleQueue[list[Buffer] | None]] = {}
        self._closed: set[int] = set()
        self._is_closing = threading.Event()
        self._senders: list[threading.Thread] = []
        self._receivers: list[threading.Thread] = []
        for peer in self._peers:
            self._queues[peer] = SimpleQueue()
            self._senders.append(self._thread(self._send_all, peer))
            self._receivers.append(self._thread(self._receive_all, peer))
        for thread in (*self._senders, *self._receivers):
            thread.start()

    def _thread(self, work: Callable[[int], None], peer: int) -> threading.Thread:
        name = f"penstock-rank-{peer}"
        return threading.Thread(target=work, args=(peer,), name=name, daemon=True)

    def send(self, to: int, message: Message) -> None:
        if to not in self._closed:
            self._queues[to].put(packed(message))

    def collect(self) -> None:
        """Does nothing: threads receive."""

    def wait(self, test: Callable[[], bool]) -> None:
        with self.mail.changed:
            self.mail.changed.wait_for(lambda: bool(self.mail.lost) or test())

    def close(self, why: str = "") -> None:
        """Says to the others that nothing more comes, and ends the threads."""
        if self._is_closing.is_set():
            return
        self._is_closing.set()
        for peer, queue in self._queues.items():
            if peer not in self._closed:
                queue.put(packed(Message(Kind.BYE, text=readable(why))))
            queue.put(None)
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
        queue, there = self._queues[peer], self._peers[peer]
        alive = packed(Message(Kind.ALIVE))
        try:
            while True:
                try:
                    pieces = queue.get(timeout=ALIVE_SECONDS)
                except Empty:
                    pieces = alive
                if pieces is None:
                    return
                for piece in pieces:
                    _send(there, memoryview(piece))
        except TimeoutError:
            self._lose(peer, f"it has taken nothing for {SILENT_SECONDS:.0f} seconds")
        except OSError as error:
            self._lose(peer, f"nothing can be sent to it ({error})")

    def _receive_all(self, peer: int) -> None:
        there = self._peers[peer]

        def receive(buffer: memoryview) -> None:
            while buffer:
                num = there.recv_into(buffer)
                if not num:
                    raise EOFError("it has ended, or was killed")
                buffer = buffer[num:]

        try:
            while True:
                message = unpacked(receive)
                if message.kind is Kind.BYE:
                    self._closed.add(peer)
                if message.kind is not Kind.ALIVE:
                    self.mail.deliver(peer, message)
        except TimeoutError:
            self._lose(
                peer,
                f"it has sent nothing for {SILENT_SECONDS:.0f} seconds: it is stopped, "
                "or its machine is",
            )
        except EOFError as error:
            self._lose(peer, str(error))
        except (OSError, ValueError) as error:
            self._lose(peer, str(error))

    def _lose(self, peer: int, why: str) -> None:
        if peer in self._closed or self._is_closing.is_set():
            return
        self.mail.lose(
            f"rank {peer} is gone: {why}; its own messages say more; what is done "
            "stays: run the same command again"
        )


def _send(there: socket.socket, piece: memoryview) -> None:
    """Sends `piece`. Raises TimeoutError if nothing of it goes for some seconds:
    `sendall` would if all of it took that long."""
    while piece:
        piece = piece[there.send(piece) :]
