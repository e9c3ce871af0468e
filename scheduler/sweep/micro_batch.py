"""One micro-batch: the caller's function in a greenlet, and what is its alone."""

import logging
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import Any

import greenlet
import torch

from ...io.errors import ClosedError
from ..activations.held import held_bytes
from ..activations.ownership import Ownership
from .module_state import ModuleState, Values
from .thread_state import ThreadState

_log = logging.getLogger("penstock")

# A micro-batch may catch the exit and call the model again; not for ever.
_MAX_EXITS = 100


class MicroBatch:
    """Runs `work()` piece by piece: `start`, then `resume` until it `is_done`.

    Between pieces it keeps its own thread state, context variables, module state and
    random state; the hub's are put back whenever it is not running. Only when it parks
    the thread stays plain: the hub is about to let another one run, and twice the work
    for each product would be felt.
    """

    def __init__(
        self,
        index: int,
        work: "partial[Any]",
        *,
        devices: tuple[str, ...],
        hub_state: ThreadState,
        module_state: ModuleState,
    ) -> None:
        self.index = index
        self.num_arrivals = 0
        """Sites that it came to so far."""
        self.last_site: int | None = None
        self.visited: set[int] = set()
        self.records_gradients = False
        """Whether it did when it came to the site where it waits."""
        self.inside: list[int] = []
        self.is_parked = False
        """Whether it waits inside of a site, for others to come where it is."""
        self.last_module: int | None = None
        self.called: set[int] = set()
        """The row-wise modules that it called."""
        self.value: Any = None
        self.error: BaseException | None = None
        self._num_exits = 0
        self._work = work
        self._state = ThreadState(devices)
        self._hub_state = hub_state
        self._module_state = module_state
        self._module_values: Values = ()
        self._flow: Any = greenlet.greenlet(self._run)
        self._flow.gr_context = copy_context()

    @property
    def is_done(self) -> bool:
        return bool(self._flow.dead)

    @property
    def is_alive(self) -> bool:
        """Whether it was started and did not end."""
        return bool(self._flow)

    @property
    def is_current(self) -> bool:
        """Whether the caller is this micro-batch's own code."""
        return self._flow is greenlet.getcurrent()

    def start(self, seed: int) -> None:
        """Runs until the first wait or the end, with a random state of its own."""
        self._switch(
            lambda: self._state.start_like(self._hub_state, seed), self._flow.switch
        )

    def resume(self) -> None:
        """Runs on until the next wait or the end."""
        self._switch(self._state.resume, self._flow.switch)

    def exit(self) -> None:
        """Unwinds what waits, `finally` and all, under its own state."""
        if not self.is_alive:
            return
        self._switch(
            self._state.resume, lambda: self._flow.throw(greenlet.GreenletExit)
        )

    def exit_here(self) -> None:
        """Called by the running micro-batch, which is to end."""
        self._num_exits += 1
        if self._num_exits <= _MAX_EXITS:
            raise greenlet.GreenletExit
        _log.warning("micro-batch %d swallows its exit and is left behind", self.index)
        while True:
            self.wait()

    def park(self) -> None:
        """Like `wait`, for a short time and inside of a site."""
        self.is_parked = True
        self.wait()

    def wait(self) -> None:
        """Called by the running micro-batch: back to the hub until resumed."""
        self._module_values = self._module_state.take()
        self._state.suspend()
        self._flow.parent.switch()

    def held_bytes(self) -> int:
        """Bytes of activations that it keeps alive while it waits."""
        return held_bytes(self._flow.gr_frame, self._work)

    def own_storages(self, ownership: Ownership) -> list[torch.UntypedStorage]:
        """The memory on the device that is its alone while it waits."""
        return ownership.own(self.index, self._flow.gr_frame, self._work)

    def _switch(self, put_state: Callable[[], None], go: Callable[[], Any]) -> None:
        self._flow.parent = greenlet.getcurrent()
        self.is_parked = False
        hub_values = self._module_state.take()
        try:
            if not self._hub_state.is_suspended:
                self._hub_state.suspend()
            put_state()
            self._module_state.put(self._module_values)
            go()
        finally:
            if self.is_done:  # an interrupt in `wait` left it suspended for ever
                self._state.resume()
                self.is_parked = False
            if not self.is_parked:
                self._hub_state.resume()
            self._module_state.put(hub_values)

    def _run(self) -> None:
        try:
            self.value = self._work()
        except greenlet.GreenletExit:
            self.error = ClosedError("the sweep was stopped before this finished")
        except BaseException as error:  # the sweep's owner decides whose it is
            self.error = error
        finally:
            self._module_state.look(self.index, self.last_site, None)
