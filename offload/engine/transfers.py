"""How a unit lies in a slot of the device."""

from ...io.weights.layout import Layout
from ...io.weights.transfer import Transfer, packed, same_layout
from ..policy import Policy

_SLOT_ALIGNMENT = 512  # of a GPU's slots and runs: what its allocator gives, too


def transfer_of(is_host: bool, policy: Policy, plan: Layout) -> Transfer:
    """How a unit is laid out in a slot of the host (`is_host`) or of a GPU."""
    if is_host:
        return same_layout(plan)
    return packed(plan, alignment=_SLOT_ALIGNMENT, max_gap_bytes=policy.io.max_gap)
