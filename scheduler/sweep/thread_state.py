"""Saves and restores torch's thread-local state, which greenlets of one thread share.

Grad mode, inference mode, autocast, function modes and the random generator belong to a
thread, not to a greenlet. They would leak from one micro-batch into the next, and
ending one inside `inference_mode` would leave the caller in that mode. The same holds
for two process-wide settings that code changes for a while: the default dtype, and the
attention kernels that may be chosen (`sdpa_kernel`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

# torch's own guard. Entering it saves the grad mode and the set of dispatch keys;
# leaving it restores exactly those.
_Guard = torch._C._InferenceMode


@dataclass(slots=True)  # not frozen: those are slower to create
class _Settings:
    """The part of the state that `_Guard` does not save."""

    autocast: list[tuple[str, bool, torch.dtype]]
    is_autocast_cached: bool
    default_dtype: torch.dtype
    attention: tuple[bool, ...]
    random: list[tuple[str, torch.Tensor]]

    @classmethod
    def current(cls, devices: tuple[str, ...]) -> "_Settings":
        return cls(
            [
                (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
                for kind in map(_kind, devices)
            ],
            torch.is_autocast_cache_enabled(),
            torch.get_default_dtype(),
            _attention_kernels(),
            [(device, _random_state(device)) for device in devices],
        )

    def apply(self) -> None:
        for kind, is_enabled, dtype in self.autocast:
            torch.set_autocast_enabled(kind, is_enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(self.is_autocast_cached)
        if torch.get_default_dtype() != self.default_dtype:
            torch.set_default_dtype(self.default_dtype)
        if _attention_kernels() != self.attention:
            _set_attention_kernels(self.attention)
        for device, state in self.random:
            _set_random_state(device, state)


class ThreadState:
    """The thread state of one flow of control (a micro-batch or the sweep loop).

    `suspend` saves the state of the running flow and `resume` restores it. `start_like`
    starts a new flow with the state of a suspended one. Between two flows the thread is
    in plain inference mode.

    An interrupt (Ctrl-C) may cut off either method. `resume` can be called again until
    it has run to its end, and does nothing after that.
    """

    def __init__(self, devices: tuple[str, ...]) -> None:
        self._devices = devices
        self._guard: Any = None
        self._settings: _Settings | None = None
        self._function_modes: list[Any] = []
        self._dispatch_modes: list[Any] = []
        self._is_suspended = False

    @property
    def is_suspended(self) -> bool:
        return self._is_suspended

    def suspend(self) -> None:
        """Saves this flow's state and leaves the thread in plain inference mode."""
        self._settings = None
        self._dispatch_modes, self._function_modes = current_modes()
        self._is_suspended = True
        # Modes first: they would intercept the calls that follow.
        _drop_modes()
        self._settings = _Settings.current(self._devices)
        self._guard = _Guard(True)
        self._guard.__enter__()
        for device in self._devices:
            torch.set_autocast_enabled(_kind(device), False)

    def resume(self) -> None:
        """Restores what `suspend` saved, whatever state the last flow has left."""
        if not self._is_suspended:
            return
        _drop_modes()
        # Settings first: they change dispatch keys, which the guard then restores.
        if self._settings is not None:
            self._settings.apply()
        if self._guard is not None:
            self._guard.__exit__(None, None, None)
            self._guard = None
        _put_modes(self._dispatch_modes, self._function_modes)
        self._is_suspended = False

    def start_like(self, other: "ThreadState", seed: int) -> None:
        """Starts this flow with the settings and modes of the suspended `other`, in
        inference mode, with a random state of its own from `seed`."""
        assert other._settings is not None, "only a suspended flow can be copied"
        other._settings.apply()
        for device in self._devices:
            generator = torch.Generator(device).manual_seed(seed)
            _set_random_state(device, generator.get_state())
        _put_modes(other._dispatch_modes, other._function_modes)


def current_modes() -> tuple[list[Any], list[Any]]:
    """The thread's stacks of dispatch and function modes. Most are empty; asking for
    the length first is faster."""
    dispatch, function = [], []
    if torch._C._len_torch_dispatch_stack():
        dispatch = _get_current_dispatch_mode_stack()
    if torch._C._len_torch_function_stack():
        function = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return dispatch, function


def _drop_modes() -> None:
    """Empties the thread's mode stacks."""
    for _ in range(torch._C._len_torch_dispatch_stack()):
        torch._C._pop_torch_dispatch_stack(None)
    for _ in range(torch._C._len_torch_function_stack()):
        torch._C._pop_torch_function_stack()


def _put_modes(dispatch: list[Any], function: list[Any]) -> None:
    for mode in dispatch:
        torch._C._push_on_torch_dispatch_stack(mode)
    for mode in function:
        torch._C._push_on_torch_function_stack(mode)


def _attention_kernels() -> tuple[bool, ...]:
    return (
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
        torch._C._get_cudnn_sdp_enabled(),
    )


def _set_attention_kernels(enabled: tuple[bool, ...]) -> None:
    flash, mem_efficient, math, cudnn = enabled
    torch._C._set_sdp_use_flash(flash)
    torch._C._set_sdp_use_mem_efficient(mem_efficient)
    torch._C._set_sdp_use_math(math)
    torch._C._set_sdp_use_cudnn(cudnn)


def _kind(device: str) -> str:
    """The device type ("cuda" of "cuda:1"), for which autocast is set as a whole."""
    return device.partition(":")[0]


def _random_state(device: str) -> torch.Tensor:
    if device == "cpu":
        return torch.get_rng_state()
    state: torch.Tensor = _accelerator(device).get_rng_state(device)
    return state


def _set_random_state(device: str, state: torch.Tensor) -> None:
    if device == "cpu":
        torch.set_rng_state(state)
    else:
        _accelerator(device).set_rng_state(state, device)


def _accelerator(device: str) -> Any:
    return torch.get_device_module(torch.device(device))
