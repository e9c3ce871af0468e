"""How units lie in the memory of tiers, and how links bring them from there."""

from collections.abc import Sequence

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

    def __repr__(self) -> str:
        kind = "as stored" if self.are_images else "decoded"
        return f"<KeptUnits: {len(self.layouts)} units, {kind}>"

    def replace(self, unit: int, image: StoredImage) -> None:
        """From now on, `unit` is kept as `image`."""
        self._images[unit] = image.layout
        self.transfers[unit] = image.transfer
        self.to_peer[unit] = same_layout(image.layout)

    def ring_bytes(self) -> int:
        """Bytes of a ring buffer through which units are read: for three units.

        An image must also fit after an update, with new values beside the stored ones.
        """
        largest = max(plan.nbytes for plan in self.layouts)
        if not self.are_images:
            return 3 * largest
        most = max(
            plan.nbytes + slot.nbytes + 2 * _PAGE * (1 + len(slot.tensors))
            for plan, slot in zip(self.layouts, self._slots, strict=True)
        )
        return max(3 * largest, align_up(most, _PAGE))
