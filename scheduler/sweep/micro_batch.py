"""One micro-batch: the user's function in a greenlet, and the state that is its own."""

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

# A micro-batch may catch GreenletExit and call the model again. After this many it is
# suspended and not resumed.
_MAX_EXITS = 100


class MicroBatch:
    """Runs `work()` piece by piece: `start`, then `resume` until it `is_done`.

    Between pieces it keeps its own thread state, context variables, module state and
    random state, and the sweep loop's are restored. There is one exception: when a
    micro-batch parks, the thread stays in plain inference mode, because another one
    runs next at once and restoring the loop's state would double the cost of a switch.
    """

    def __init__(
        self,
        index: int,
        work: "partial[Any]",
        *,
        devices: tuple[str, ...],
        loop_state: ThreadState,
        module_state: ModuleState,
    ) -> None:
        self.index = index
        self.num_arrivals = 0
        """How many times it has reached a site."""
        self.last_site: int | None = None
        self.visited: set[int] = set()
        self.records_gradients = False
        """Whether grad mode was on when it reached its current site."""
        self.inside: list[int] = []
        self.arrived: Callable[[], None] | None = None
        """Called in the micro-batch before it runs a site; see `Sweep.watch`."""
        self.is_parked = False
        """Whether it waits inside a site, at a row-wise module, for others to reach the
        same module."""
        self.last_module: int | None = None
        self.called: set[int] = set()
        """The row-wise modules that it has called."""
        self.value: Any = None
        self.error: BaseException | None = None
        self._num_exits = 0
        self._work = work
        self._state = ThreadState(devices)
        self._loop_state = loop_state
        self._module_state = module_state
        self._module_values: Values = ()
        self._flow: Any = greenlet.greenlet(self._run)
        self._flow.gr_context = copy_context()

    @property
    def is_done(self) -> bool:
        return bool(self._flow.dead)

    @property
    def is_alive(self) -> bool:
        """Whether it has started and not ended."""
        return bool(self._flow)

    @property
    def is_current(self) -> bool:
        """Whether the caller runs inside this micro-batch."""
        return self._flow is greenlet.getcurrent()

    def start(self, seed: int) -> None:
        """Runs until the first wait or the end. Its own random state starts from
        `seed`."""
        self._switch(
            lambda: self._state.start_like(self._loop_state, seed), self._flow.switch
        )

    def resume(self) -> None:
        """Continues until the next wait or the end."""
        self._switch(self._state.resume, self._flow.switch)

    def exit(self) -> None:
        """Raises GreenletExit where it waits, so that its `finally` blocks run, under
        its own thread state."""
        if not self.is_alive:
            return
        self._switch(
            self._state.resume, lambda: self._flow.throw(greenlet.GreenletExit)
        )

    def exit_here(self) -> None:
        """Raises GreenletExit in the running micro-batch, which calls this. After
        `_MAX_EXITS` of them it is suspended for ever."""
        self._num_exits += 1
        if self._num_exits <= _MAX_EXITS:
            raise greenlet.GreenletExit
        _log.warning("micro-batch %d swallows its exit and is left behind", self.index)
        while True:
            self.wait()

    def may_run(self, site: int, previous: int | None) -> None:
        """Called before it runs `site`, and after `previous`. Raises what `arrived`
        raises: then it does not run `site`."""
        if self.arrived is not None:
            self.last_site = previous
            self.arrived()
            self.last_site = site

    def park(self) -> None:
        """Suspends the running micro-batch inside a site, for a short time: see
        `is_parked`."""
        self.is_parked = True
        self.wait()

    def wait(self) -> None:
        """Suspends the running micro-batch, which calls this, until `resume`."""
        self._module_values = self._module_state.take()
        self._state.suspend()
        self._flow.parent.switch()

    def held_bytes(self) -> int:
        """The bytes of activations that it keeps alive while it is suspended."""
        return held_bytes(self._flow.gr_frame, self._work)

    def own_storages(self, ownership: Ownership) -> list[torch.UntypedStorage]:
        """The storages on the device that only it refers to while it is suspended."""
        return ownership.own(self.index, self._flow.gr_frame, self._work)

    def _switch(self, put_state: Callable[[], None], go: Callable[[], Any]) -> None:
        self._flow.parent = greenlet.getcurrent()
        self.is_parked = False
        loop_values = self._module_state.take()
        try:
            if not self._loop_state.is_suspended:
                self._loop_state.suspend()
            put_state()
            self._module_state.put(self._module_values)
            go()
        finally:
            if self.is_done:  # an interrupt in `wait` may have left it suspended
                self._state.resume()
                self.is_parked = False
            if not self.is_parked:
                self._loop_state.resume()
            self._module_state.put(loop_values)

    def _run(self) -> None:
        try:
            self.value = self._work()
        except greenlet.GreenletExit:
            self.error = ClosedError("the sweep was stopped before this finished")
        except BaseException as error:  # the sweep loop raises it or reports it
            self.error = error
        finally:
            self._module_state.look(self.index, self.last_site, None)
