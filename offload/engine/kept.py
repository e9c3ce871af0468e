"""How units lie in the memory of tiers, and how links bring them from there."""

from collections.abc import Sequence
from typing import Literal

from ...io.errors import UsageError
from ...io.extent import align_up
from ...io.weights.layout import Layout
from ...io.weights.stored_image import StoredImage
from ...io.weights.transfer import Transfer, same_layout

_PAGE = 4096


class KeptUnits:
    """Plans of all units: those of `layouts` and `transfers`, or those of `images`."""

    def __init__(
        self,
        layouts: Sequence[Layout],
        transfers: Sequence[Transfer],
        images: Sequence[StoredImage] | None,
        staging_memory: int | Literal["auto"],
    ) -> None:
        self.are_images = images is not None
        self._slots = transfers
        self.layouts = layouts
        """How units are read into host memory from which links bring them."""
        self.transfers = dict(enumerate(transfers))
        """How links bring units from there into slots."""
        self.to_peer = self.transfers
        """How links bring units from there to a peer."""
        self.from_peer = {u: same_layout(plan) for u, plan in self.transfers.items()}
        """How links bring units from a peer into slots."""
        if images is not None:
            self.layouts = self._images = [image.layout for image in images]
            self.transfers = self.from_peer = {}
            self.to_peer = {}
            for unit, image in enumerate(images):
                self.replace(unit, image)
        largest = max(plan.nbytes for plan in self.layouts)
        self.staging_bytes = (
            self._ring_bytes(largest)
            if staging_memory == "auto"
            else max(staging_memory, largest)
        )
        """Bytes of a ring buffer through which units are read from disk."""

    def __repr__(self) -> str:
        kind = "as stored" if self.are_images else "decoded"
        return f"<KeptUnits: {len(self.layouts)} units, {kind}>"

    def replace(self, unit: int, image: StoredImage) -> None:
        """From now on, `unit` is kept as `image`."""
        self._images[unit] = image.layout
        self.transfers[unit] = image.transfer
        self.to_peer[unit] = same_layout(image.layout)

    def check_staging(self, image: StoredImage) -> None:
        """Raises UsageError if `image` does not fit into the ring buffer."""
        needed = image.layout.nbytes
        if needed > self.staging_bytes:
            raise UsageError(
                f"{image.layout.name} takes {needed:,} bytes with its new values, and "
                f"staging_memory has {self.staging_bytes:,}: raise it to at least "
                f"{needed:,}, or set weights_kept: decoded"
            )

    def _ring_bytes(self, largest: int) -> int:
        """For three units. An image must also fit after an update, with new values
        beside the stored ones."""
        if not self.are_images:
            return 3 * largest
        most = max(
            plan.nbytes + slot.nbytes + 2 * _PAGE * (1 + len(slot.tensors))
            for plan, slot in zip(self.layouts, self._slots, strict=True)
        )
        return max(3 * largest, align_up(most, _PAGE))
