"""Chooses the tier for new keys and values: the one that was asked for while it has
room, then the next slower one. Pure."""

from collections import Counter, deque
from collections.abc import Mapping, Sequence

from ...io.errors import DoesNotFitError


class KvBudget:
    """Counts the bytes taken from each of `tiers`, up to `limits`. Tiers are tried in
    order."""

    def __init__(self, tiers: Sequence[str], limits: Mapping[str, int]) -> None:
        self._tiers = tuple(tiers)
        self._limits = dict(limits)
        self._held: Counter[str] = Counter()
        self._peak: Counter[str] = Counter()
        # A cache may be garbage collected on any thread while a method here runs.
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
        """Takes `nbytes`, given by tier, from the first tier that has room, and returns
        that tier. Raises DoesNotFitError if none has."""
        self._settle()
        for tier in self._tiers:
            if self._held[tier] + nbytes[tier] <= self._limits[tier]:
                self._add(tier, nbytes[tier])
                return tier
        raise DoesNotFitError(self._explain(nbytes))

    def resize(self, tier: str, old: int, new: int) -> None:
        """Changes an allocation in `tier` from `old` to `new` bytes. Raises
        DoesNotFitError if there is no room."""
        self._settle()
        if self._held[tier] + new - old > self._limits[tier]:
            raise DoesNotFitError(self._explain({tier: new - old}))
        self._add(tier, new - old)

    def give_back(self, tier: str, nbytes: int) -> None:
        """Returns `nbytes` to `tier`. May be called by any thread."""
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
