"""How differently two models score the same texts. Pure sums over tokens."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from .token_scores import TokenScores


@dataclass(slots=True)
class TextQuality:
    """Sums over the rows that both models scored."""

    dtype: str
    """The dtype that both computed in."""
    rows: int = 0
    rows_failed: int = 0
    first_error: str | None = None
    """Why the first row failed that did."""
    tokens: int = 0
    num_same_top: int = 0
    """For how many tokens both models hold the same one for most probable."""
    is_identical: bool = True
    """Whether every log-probability is equal, bit for bit."""
    logprob: float = 0.0
    """The sum of the model's log-probabilities."""
    original_logprob: float = 0.0
    distance: float = 0.0
    """The sum of the sizes of their differences, token by token."""
    squares: float = 0.0
    """The sum of the squares of these."""

    def fail(self, identity: Any, error: str) -> None:
        """Counts a row that one of the models could not score."""
        self.rows_failed += 1
        if self.first_error is None:
            self.first_error = f"row {identity!r:.60}: {error}"

    def add(self, scores: TokenScores, original: TokenScores) -> None:
        """Adds a row that both have scored. Both have as many tokens."""
        one, other = scores.logprobs, original.logprobs
        self.rows += 1
        self.tokens += len(one)
        self.num_same_top += int((scores.tops == original.tops).sum())
        same = torch.equal(one.view(torch.int32), other.view(torch.int32))
        self.is_identical = self.is_identical and same
        a, b = one.double(), other.double()
        self.logprob += float(a.sum())
        self.original_logprob += float(b.sum())
        self.distance += float((a - b).abs().sum())
        self.squares += float((a - b).square().sum())

    @property
    def perplexity(self) -> float:
        """Of the model, over all tokens."""
        return _perplexity(self.logprob / self.tokens)

    @property
    def original_perplexity(self) -> float:
        """Of the original, over all tokens."""
        return _perplexity(self.original_logprob / self.tokens)

    @property
    def difference(self) -> float:
        """The model's perplexity less the original's, divided by the original's."""
        return math.expm1(min(-self._change / self.tokens, 700.0)) + 0.0  # not -0.0

    @property
    def standard_error(self) -> float | None:
        """The standard error of `difference`, as if tokens were independent; None for
        a single token."""
        n = self.tokens
        if n < 2:
            return None
        variance = max(0.0, self.squares - self._change**2 / n) / (n - 1)
        return (1 + self.difference) * math.sqrt(variance / n)

    @property
    def agreement(self) -> float:
        """For which share of the tokens both hold the same one for most probable."""
        return self.num_same_top / self.tokens

    @property
    def _change(self) -> float:
        return self.logprob - self.original_logprob

    def figures(self) -> dict[str, Any]:
        """The figures as JSON takes them. Shares are from 0 to 1, logs are natural."""
        return {
            "dtype": self.dtype,
            "rows": self.rows,
            "rows_failed": self.rows_failed,
            "first_error": self.first_error,
            "tokens": self.tokens,
            "is_identical": self.is_identical,
            "perplexity": self.perplexity,
            "original_perplexity": self.original_perplexity,
            "perplexity_difference": self.difference,
            "perplexity_difference_standard_error": self.standard_error,
            "top1_agreement": self.agreement,
            "mean_logprob_distance": self.distance / self.tokens,
        }


def _perplexity(mean_logprob: float) -> float:
    return math.exp(min(-mean_logprob, 709.0))
