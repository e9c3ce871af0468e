"""What one rank has counted of its exchange with others. Pure."""

from dataclasses import dataclass

from ...io.merging import Rule, counter


@dataclass(frozen=True, kw_only=True, slots=True)
class RankStatistics:
    """Counters of one rank since its model was loaded."""

    num_ranks: int = 1
    """The ranks that share the model; 1: this process has all of it."""
    bytes_sent: int = counter(Rule.SUM, 0)
    """Bytes of outputs, or of weights, that this rank has sent to others."""
    num_sent: int = counter(Rule.SUM, 0)
    """The messages that had them."""
    num_gathers: int = counter(Rule.MOST, 0)
    """The products whose rows ranks have put together (`ranks: tensor`)."""
    wait_seconds: float = counter(Rule.MEAN, 0.0)
    """Time that computing waited for other ranks."""
