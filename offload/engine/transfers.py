"""The layout of a unit in its slot."""

from ...io.weights.layout import Layout
from ...io.weights.transfer import Transfer, packed, same_layout
from ..policy import Policy

_SLOT_ALIGNMENT = 512  # bytes; on a GPU, the same as torch's allocator


def transfer_of(is_host: bool, policy: Policy, plan: Layout) -> Transfer:
    """Returns how the unit of `plan` lies in a slot: in host memory (`is_host`) as it
    is read, on a GPU packed."""
    if is_host:
        return same_layout(plan)
    return packed(plan, alignment=_SLOT_ALIGNMENT, max_gap_bytes=policy.io.max_gap)
