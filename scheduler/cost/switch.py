"""For how many tokens a pass one way to share a model is faster than another. Pure."""

from collections.abc import Callable
from dataclasses import dataclass

Seconds = Callable[[int], float]
"""The seconds of a pass of so many tokens."""
MOST_TOKENS = 1 << 18
"""The most tokens of a pass that are looked at."""
_EXACT = 64
"""The ends of a range are found to one part of so many."""


@dataclass(frozen=True, slots=True)
class Switch:
    """The passes for which `few` is faster than `many`: those from `least` to `most`
    tokens. Usually `few` moves activations, and is faster up to some number."""

    few: str
    many: str
    least: int
    """The least tokens that are looked at, if it is faster for these."""
    most: int | None
    """0 where it never is faster, None where it is up to all that are looked at."""


def switch_of(
    few: tuple[str, Seconds], many: tuple[str, Seconds], *, least: int = 1
) -> Switch:
    """Where `many`, a name and its seconds, gets faster than `few`: looks at powers of
    two from `least` tokens on, takes the last ones for which `few` is faster, and
    looks between these and the next ones."""

    def is_few(tokens: int) -> bool:
        return few[1](tokens) <= many[1](tokens)

    tried = [least]
    while tried[-1] < MOST_TOKENS:
        tried.append(2 * tried[-1])
    found = [is_few(tokens) for tokens in tried]
    if not any(found):
        return Switch(few[0], many[0], least, 0)
    last = max(index for index, one in enumerate(found) if one)
    first = last
    while first and found[first - 1]:
        first -= 1
    most: int | None = None
    if last + 1 < len(tried):
        most = _edge(is_few, tried[last], tried[last + 1])
    if first:
        least = _edge(is_few, tried[first], tried[first - 1])
    return Switch(few[0], many[0], least, most)


def _edge(test: Callable[[int], bool], inside: int, outside: int) -> int:
    """How far `test`, which is true of `inside` and not of `outside`, stays true on the
    way from one to the other, about."""
    while abs(outside - inside) > max(1, min(inside, outside) // _EXACT):
        middle = (inside + outside) // 2
        inside, outside = (middle, outside) if test(middle) else (inside, middle)
    return inside
