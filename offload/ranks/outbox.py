"""The messages that a rank has to send, in order."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from queue import SimpleQueue
from threading import Thread

from ...io.closing import Closing
from ...io.devices.host_copy import HostCopy
from ...scheduler.ranks.messages import Message
from .wire import Buffer, packed

_Late = tuple[int, Message | list[Buffer] | None]


class Outbox(Closing):
    """A queue of bytes for each of `peers`, in the order in which `put` is called.

    A message whose tensor is still on its way from an accelerator keeps back those
    behind it. A thread waits for it, so that those that send can say meanwhile that
    this rank is there. A message to nobody in `peers` is given to `deliver` instead;
    `fail` is told why a tensor has not arrived.
    """

    def __init__(
        self,
        peers: Iterable[int],
        deliver: Callable[[Message], None],
        fail: Callable[[str], None],
    ) -> None:
        self.queues: dict[int, SimpleQueue[list[Buffer] | None]] = {
            peer: SimpleQueue() for peer in peers
        }
        self._deliver = deliver
        self._fail = fail
        self._late: SimpleQueue[_Late | None] = SimpleQueue()
        self._thread: Thread | None = None

    def put(self, to: int, message: Message) -> None:
        """`message` goes to `to`. A tensor that is no late one may be changed then."""
        tensor = message.tensor
        if isinstance(tensor, HostCopy):
            if tensor.is_copy:
                self._wait_for(to, message)
                return
            message = replace(message, tensor=tensor.wait())
        self._follow(to, packed(message))

    def end(self, peer: int) -> None:
        """Nothing more goes to `peer`."""
        self._follow(peer, None)

    def close(self) -> None:
        """Ends the thread, once it has no more to wait for."""
        if self._thread is not None:
            self._late.put(None)
            self._thread = None

    def _follow(self, to: int, pieces: list[Buffer] | None) -> None:
        if self._thread is None:
            self.queues[to].put(pieces)
        else:
            self._late.put((to, pieces))

    def _wait_for(self, to: int, message: Message) -> None:
        if self._thread is None:
            self._thread = Thread(
                target=self._pass_on, name="penstock-rank-copies", daemon=True
            )
            self._thread.start()
        self._late.put((to, message))

    def _pass_on(self) -> None:
        while (late := self._late.get()) is not None:
            to, message = late
            if not isinstance(message, Message):
                self.queues[to].put(message)
                continue
            try:
                arrived = replace(message, tensor=message.tensor.wait())
            except Exception as error:
                self._fail(f"a tensor did not come from the device: {error}")
                return
            if to in self.queues:
                self.queues[to].put(packed(arrived, copies=False))
            else:
                self._deliver(arrived)
