"""The tiers of memory, in which weights, keys and values are kept."""

from enum import StrEnum


class Tier(StrEnum):
    """A kind of memory, by the name that policies and reports have for it.

    The members are ordered by speed, as the device sees them.
    """

    DEVICE = "device"
    """The memory of the device that computes."""
    PEER = "peer"
    """The memory of another device."""
    HOST = "host"
    """Memory of the CPU: pinned where a device copies from it."""
    DISK = "disk"
    """Files."""

    __repr__ = str.__repr__  # as other names in dicts that users print

    @property
    def rank(self) -> int:
        """0 for the fastest."""
        return tuple(Tier).index(self)

    @property
    def setting(self) -> str | None:
        """The policy's key that says how much of it weights may take; None: all."""
        return _SETTINGS.get(self)


_SETTINGS = {
    Tier.DEVICE: "device_memory",
    Tier.PEER: "peer",
    Tier.HOST: "host_memory",
}


KV_TIERS = (Tier.DEVICE, Tier.HOST, Tier.DISK)
"""The tiers that keep keys and values, from fast to slow."""


_BY_NAME = {tier.value: tier for tier in Tier}


def tier_of(place: str) -> Tier:
    """The tier of a unit's place: the tier's name, or the name of a peer device."""
    return _BY_NAME.get(place, Tier.PEER)
