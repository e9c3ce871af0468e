"""Which tier keeps the keys and values that come: the one that was asked for, as long
as there is room, then the next slower one. Pure."""

from collections import Counter, deque
from collections.abc import Mapping, Sequence

from ...io.errors import DoesNotFitError

TIERS = ("device", "host", "disk")
"""From fast to slow."""


class KvBudget:
    """Bytes of each of `tiers`, tried in that order, of which `limits` may be taken."""

    def __init__(self, tiers: Sequence[str], limits: Mapping[str, int]) -> None:
        self._tiers = tuple(tiers)
        self._limits = dict(limits)
        self._held: Counter[str] = Counter()
        self._peak: Counter[str] = Counter()
        # A cache may die on any thread, in the middle of anything here.
        self._returned: deque[tuple[str, int]] = deque()

    def __repr__(self) -> str:
        held = self.held
        uses = (f"{tier} {held[tier]}/{self._limits[tier]}" for tier in self._tiers)
        return f"<KvBudget: {', '.join(uses)} bytes>"

    @property
    def held(self) -> dict[str, int]:
        self._settle()
        return {tier: self._held[tier] for tier in self._tiers}

    @property
    def peak(self) -> dict[str, int]:
        return {tier: self._peak[tier] for tier in self._tiers}

    def take(self, nbytes: Mapping[str, int]) -> str:
        """The tier that keeps what needs `nbytes` in each of them. Raises
        DoesNotFitError when there is room in none."""
        self._settle()
        for tier in self._tiers:
            if self._held[tier] + nbytes[tier] <= self._limits[tier]:
                self._add(tier, nbytes[tier])
                return tier
        raise DoesNotFitError(self._explain(nbytes))

    def resize(self, tier: str, old: int, new: int) -> None:
        """What has `old` bytes of `tier` needs `new`. Raises DoesNotFitError."""
        self._settle()
        if self._held[tier] + new - old > self._limits[tier]:
            raise DoesNotFitError(self._explain({tier: new - old}))
        self._add(tier, new - old)

    def give_back(self, tier: str, nbytes: int) -> None:
        """On any thread."""
        self._returned.append((tier, nbytes))

    def _settle(self) -> None:
        while self._returned:
            tier, nbytes = self._returned.popleft()
            self._held[tier] -= nbytes

    def _add(self, tier: str, nbytes: int) -> None:
        self._held[tier] += nbytes
        self._peak[tier] = max(self._peak[tier], self._held[tier])

    def _explain(self, nbytes: Mapping[str, int]) -> str:
        uses = ", ".join(
            f"{need} bytes in {tier}, where {self._held[tier]} of "
            f"{self._limits[tier]} are taken"
            for tier, need in nbytes.items()
        )
        last = list(nbytes)[-1]
        return (
            f"no room for the keys and values of one more layer: it needs {uses}; "
            f"raise kv.limits.{last}, or sweep with a smaller width"
        )
