"""Which units have to find room at once. Pure."""

from collections.abc import Container, Iterable, Sequence


class NeededGroups:
    """Groups of units of `sizes` bytes: each of `units` by itself, and those that are
    added."""

    def __init__(self, sizes: Sequence[int], units: Iterable[int]) -> None:
        self._sizes = sizes
        self._all: set[tuple[int, ...]] = {(unit,) for unit in units}
        self._of: dict[int, dict[tuple[int, ...], tuple[int, ...]]] = {}
        """The groups of each unit that have others, one for each of the sizes that they
        have: layers have thousands of equal experts."""

    def add(self, group: tuple[int, ...], staying: Container[int]) -> None:
        """Adds a group. Units that are `staying` have their room for good."""
        self._all.add(group)
        sizes = tuple(self._sizes[unit] for unit in group if unit not in staying)
        for unit in group if len(sizes) > 1 else ():
            self._of.setdefault(unit, {}).setdefault(sizes, group)

    def missing(self, there: set[int]) -> set[tuple[int, ...]]:
        """The sizes of the units of each group that are not `there`, where some are
        not."""
        return self._missing(self._all, there)

    def missing_beside(
        self, units: Iterable[int], there: set[int]
    ) -> set[tuple[int, ...]]:
        """The same for the groups of `units` alone."""
        groups = (group for unit in units for group in self._of.get(unit, {}).values())
        return self._missing(groups, there)

    def has_others(self, units: Iterable[int]) -> bool:
        """Whether other units are needed together with some of `units`."""
        return any(unit in self._of for unit in units)

    def _missing(
        self, groups: Iterable[tuple[int, ...]], there: set[int]
    ) -> set[tuple[int, ...]]:
        found = {
            tuple(self._sizes[unit] for unit in group if unit not in there)
            for group in groups
        }
        return found - {()}
