"""Checks a policy against what is installed in this machine.

What is free is checked later, when it is taken.
"""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import torch

from ...io.errors import MachineError
from ..monitoring.memory import installed_bytes
from ..monitoring.show import human_bytes
from ..policy import Policy, cache_folder
from .contradictions import on_host as parts_of_host
from .origin import KeyPath, Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Installed:
    """Bytes that are installed, whether or not they are in use."""

    host_bytes: int
    disk_bytes: int
    """Bytes of the drive of the cache folder."""
    gpu_bytes: Mapping[str, int] = field(default_factory=dict)
    """Bytes of each GPU, by the name that the policy uses."""


def check_installed(policy: Policy) -> None:
    """Raises MachineError if budgets of `policy` exceed what this machine has.

    There is one sentence for each such budget, with the place where it was written.
    """
    problems = over_budget(policy, _look(policy))
    if problems:
        raise MachineError(*map(policy.origin.place, problems))


def over_budget(policy: Policy, installed: Installed) -> list[Problem]:
    """The budgets of `policy` that exceed what is `installed`, each alone and those in
    host memory together. Pure."""
    found: list[Problem] = []
    on_host = dict(parts_of_host(policy))
    host_bytes, one = installed.host_bytes, "the memory of this machine"
    for key, nbytes in [*on_host.items(), *_bounds(policy)]:
        found += _check(key, nbytes, host_bytes, one)
    together = sum(on_host.values())
    if not found and together > host_bytes:
        parts = [f"{_dotted(key)} {human_bytes(n)}" for key, n in on_host.items()]
        found.append(
            Problem(
                f"{' + '.join(parts)} make {human_bytes(together)}, which is more than "
                f"{one}, {human_bytes(host_bytes)}: lower them by "
                f"{human_bytes(together - host_bytes)} ({together - host_bytes} bytes)",
                tuple(on_host),
            )
        )
    for key, name, nbytes in _on_gpus(policy):
        if name in installed.gpu_bytes:
            have = installed.gpu_bytes[name]
            found += _check(key, nbytes, have, f"the memory of {name}")
    on_disk = policy.kv.limits.get("disk", 0)
    key = ("kv", "limits", "disk")
    found += _check(key, on_disk, installed.disk_bytes, "the drive of io.cache")
    return found


def _check(key: KeyPath, nbytes: int, have: int, what: str) -> Iterator[Problem]:
    if nbytes > have:
        yield Problem(
            f"{_dotted(key)} of {human_bytes(nbytes)} is more than {what}, "
            f"{human_bytes(have)}: set it to less than that ({have} bytes)",
            (key,),
        )


def _bounds(policy: Policy) -> Iterator[tuple[KeyPath, int]]:
    """The limits of host memory that are not parts of it, but apply to parts or to all
    of it."""
    if policy.memory != "auto":
        yield ("memory",), policy.memory
    if policy.pinned_memory != "auto":
        yield ("pinned_memory",), policy.pinned_memory


def _on_gpus(policy: Policy) -> Iterator[tuple[KeyPath, str, int]]:
    if isinstance(policy.device_memory, int):
        yield ("device_memory",), policy.device, policy.device_memory
    for name, nbytes in policy.peer.items():
        yield ("peer", name), name, nbytes


def _look(policy: Policy) -> Installed:
    folder = cache_folder(policy.io).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return Installed(
        host_bytes=installed_bytes(),
        disk_bytes=shutil.disk_usage(there).total,
        gpu_bytes={
            name: torch.cuda.get_device_properties(name).total_memory
            for name in {policy.device, *policy.peer}
            if name != "cpu" and _is_there(name)
        },
    )


def _is_there(name: str) -> bool:
    """Whether the GPU `name` exists. If not, opening the device raises an error."""
    if not torch.cuda.is_available():
        return False
    return (torch.device(name).index or 0) < torch.cuda.device_count()


def _dotted(key: KeyPath) -> str:
    return ".".join(key)


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout that is not installed
        return "checkout"
