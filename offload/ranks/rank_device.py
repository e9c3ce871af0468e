"""Which device a rank computes on, and how many ranks have the same one. Pure."""

from collections.abc import Sequence


def device_of(name: str, local_rank: int, there: Sequence[str]) -> str:
    """The device of the rank with this number on its machine, where the policy says
    `name` and `there` are its accelerators: without a number in `name`, each rank takes
    its own, as long as there are several."""
    if name == "cpu" or ":" in name or len(there) < 2:
        return name
    return there[local_rank % len(there)]


def num_sharing(name: str, num_local: int, there: Sequence[str]) -> int:
    """The most ranks of a machine with `num_local` of them that have one device."""
    if name == "cpu" or ":" in name or not there:
        return num_local
    return -(-num_local // len(there))
