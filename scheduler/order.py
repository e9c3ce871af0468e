"""The order in which sites run, learnt from observed calls. Pure.

A site is a module that a micro-batch may enter once its units of weights are loaded.
"""

from collections.abc import Callable, Collection


class Order:
    """Predicts the next site, and chooses among the sites that micro-batches wait for.

    At first, sites are expected in definition order. Every observed arrival updates two
    things: the sequence in which micro-batches reach sites, and for each site the
    successor, which is the site that followed it last. A wrong prediction costs a
    needless read; the computed result is never affected.
    """

    def __init__(self, num_sites: int) -> None:
        self._num_sites = num_sites
        self._sequence: list[int] = []
        self._successor: dict[int, int] = {}
        self._last: set[int] = set()

    @property
    def first(self) -> int | None:
        """The site where a new micro-batch is expected first."""
        if self._sequence:
            return self._sequence[0]
        return 0 if self._num_sites else None

    def observe(self, previous: int | None, site: int, *, is_repeat: bool) -> None:
        """A micro-batch that came from `previous` (None: just started) is at `site`,
        where it was before (`is_repeat`: a loop, another pass) or was not."""
        if previous is not None:
            self._successor[previous] = site
        sequence = self._sequence
        after = sequence.index(previous) if previous in sequence else -1
        if site not in sequence:
            # A micro-batch may skip blocks: keep definition order among new sites.
            at, start = after + 1, -1 if previous is None else previous
            while at < len(sequence) and start < sequence[at] < site:
                at += 1
            sequence.insert(at, site)
        elif not is_repeat and sequence.index(site) < after:
            sequence.remove(site)  # it comes later than it was expected to
            sequence.insert(after, site)

    def observe_end(self, last: int | None) -> None:
        """A micro-batch ended after site `last` (None: it reached none). The site
        defined after `last` is no longer predicted to follow it."""
        if last is not None:
            self._last.add(last)

    def predict(self, site: int) -> int | None:
        """The site that followed `site` last or, if none was seen, the one that is
        defined after it. None if unknown."""
        if site in self._successor or site in self._last:
            return self._successor.get(site)
        following = site + 1
        unseen = following < self._num_sites and following not in self._sequence
        return following if unseen else None

    def nearest(self, site: int | None, waiting: Collection[int]) -> int:
        """The first of `waiting` after `site` in the sequence, starting again from the
        front at the end. So each round opens every site once."""
        return min(waiting, key=lambda other: self._distance(site, other))

    def upcoming(
        self,
        site: int,
        waiting: Collection[int],
        depth: int,
        stays: Callable[[int], bool] = lambda site: False,
    ) -> tuple[int, ...]:
        """The sites that will run after `site`, as far as is known. Ends once `depth`
        of them have to be loaded; those that `stays` is true for need no load."""
        upcoming: list[int] = []
        here = site
        while sum(not stays(other) for other in upcoming) < depth:
            candidates = {w for w in waiting if w != site} - set(upcoming)
            predicted = self.predict(here)
            if predicted is not None:
                candidates.add(predicted)
            if not candidates:
                break
            here = self.nearest(here, candidates)
            if here == site or here in upcoming:
                break
            upcoming.append(here)
        return tuple(upcoming)

    def fraction(self, site: int | None) -> float:
        """The part of a pass that lies before `site`, 0 to 1."""
        if site not in self._sequence or not self._num_sites:
            return 0.0
        return self._sequence.index(site) / self._num_sites

    def is_ahead(self, position: int | None, site: int) -> bool:
        """Whether going from `position` to `site` stays in the same pass. A site that
        runs several times in a row (a shared layer) does not end it."""
        if position not in self._sequence or site not in self._sequence:
            return False
        if position == site:
            return len(self._sequence) > 1
        return self._sequence.index(site) > self._sequence.index(position)

    def _distance(self, site: int | None, other: int) -> int:
        total = len(self._sequence) + 1
        if other not in self._sequence:  # a guess: expected right after `site`
            return 0
        position = self._sequence.index(other)
        if site is None or site not in self._sequence:
            return position + 1
        ahead = position - self._sequence.index(site)
        return ahead if ahead > 0 else ahead + total
