"""From how many tokens a pass on one way to share a model is faster than another.
Pure."""

from collections.abc import Callable
from dataclasses import dataclass

Seconds = Callable[[int], float]
"""The seconds of a pass of so many tokens."""
MOST_TOKENS = 1 << 20
"""The most tokens of a pass that are looked at."""


@dataclass(frozen=True, slots=True)
class Switch:
    """Where passes get faster with another way: `few` moves activations, `many` moves
    weights."""

    few: str
    many: str
    tokens: int | None
    """The most tokens a pass for which `few` is faster: 0 where it never is, None where
    it is for all that are looked at."""

    def faster(self, tokens: int) -> str:
        """The faster way for passes of `tokens`."""
        return self.few if self.tokens is None or tokens <= self.tokens else self.many


def switch_of(
    few: tuple[str, Seconds], many: tuple[str, Seconds], *, least: int = 1
) -> Switch:
    """Where `many`, a name and its seconds, gets faster than `few`. Looks at powers of
    two from `least` tokens on, and then between the two where it turns."""
    names = few[0], many[0]

    def is_few(tokens: int) -> bool:
        return few[1](tokens) <= many[1](tokens)

    if not is_few(least):
        return Switch(*names, 0)
    low = high = least
    while is_few(high):
        if high >= MOST_TOKENS:
            return Switch(*names, None)
        low, high = high, 2 * high
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if is_few(middle) else (low, middle)
    return Switch(*names, low)
