"""The time of a whole job: its passes, one after the other. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from .pipeline import PassCost
from .rates import Rates
from .shape import MicroBatchShape, split_rows, total_tokens


class PassModel(Protocol):
    """Says what passes cost: a `CostModel`, or a `RankedModel`."""

    @property
    def rates(self) -> Rates: ...

    def scoring(self, batches: Sequence[MicroBatchShape]) -> PassCost: ...

    def prefill(
        self, batches: Sequence[MicroBatchShape], context: float = 0.0
    ) -> PassCost: ...

    def decode(
        self, batches: Sequence[MicroBatchShape], context: float
    ) -> PassCost: ...


@dataclass(frozen=True, slots=True)
class Scoring:
    """Micro-batches to score, `width` of them in each pass."""

    batches: tuple[MicroBatchShape, ...]
    width: int


@dataclass(frozen=True, slots=True)
class Generating:
    """Rows of one prompt length that each get `new_tokens`, `in_flight` at a time."""

    num_rows: int
    prompt_tokens: int
    new_tokens: int
    in_flight: int
    each: int
    """Rows in a micro-batch."""
    chunk_tokens: int | None = None
    """Tokens of each prompt that one pass computes; None: all."""

    @property
    def chunks(self) -> tuple[int, ...]:
        """The number of prompt tokens of each prefill pass. All are equal except the
        last one, which gets the rest."""
        chunk = min(self.chunk_tokens or self.prompt_tokens, self.prompt_tokens)
        whole, rest = divmod(self.prompt_tokens, max(1, chunk))
        return (chunk,) * whole + (rest,) * bool(rest) or (0,)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The predicted time of a job."""

    seconds: float
    passes: int
    tokens: int
    """Tokens computed by the model, padding included; when generating, prompt tokens
    and new tokens."""
    output_tokens: int
    pass_seconds: float
    """Time of one pass in the middle of the job; when generating, a decode pass."""
    binds: str
    """What bounds that pass: `compute`, the tier at the end of a link, or `ranks` where
    ranks wait for each other."""
    wait_seconds: float
    """How long computing waits in that pass."""
    compute_seconds: float
    """How long that pass computes."""
    busy_seconds: Mapping[str, float]
    """How long each link is busy in that pass, with weights, caches and activations."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def output_tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds if self.seconds else 0.0


def predict(model: PassModel, work: Scoring | Generating) -> Prediction:
    """Predicts how long `work` takes, from its first pass to its last."""
    if isinstance(work, Scoring):
        return _scoring(model, work)
    return _generating(model, work)


def _scoring(model: PassModel, work: Scoring) -> Prediction:
    width = max(1, work.width)
    starts = range(0, len(work.batches), width)
    groups = [work.batches[start : start + width] for start in starts]
    known: dict[tuple[MicroBatchShape, ...], PassCost] = {}
    for group in groups:
        if group not in known:
            known[group] = model.scoring(group)
    costs = [known[group] for group in groups]
    seconds = model.rates.calls.job + costs[0].first
    seconds += sum(cost.steady for cost in costs[1:])
    typical = costs[len(costs) // 2]
    return _prediction(seconds, len(groups), total_tokens(work.batches), 0, typical)


def _generating(model: PassModel, work: Generating) -> Prediction:
    seconds, passes = model.rates.calls.job, 0
    typical: PassCost | None = None
    known: dict[int, tuple[PassCost, PassCost, PassCost]] = {}
    for start in range(0, work.num_rows, work.in_flight):
        num_rows = min(work.in_flight, work.num_rows - start)
        if num_rows not in known:
            known[num_rows] = _phases(model, work, num_rows)
        first, others, decode = known[num_rows]
        seconds += first.steady if passes else first.first
        seconds += others.steady * (len(work.chunks) - 1)
        seconds += decode.steady * (work.new_tokens - 1)
        passes += len(work.chunks) + work.new_tokens - 1
        typical = typical or decode
    assert typical is not None, "there are rows"
    output = work.num_rows * work.new_tokens
    tokens = work.num_rows * work.prompt_tokens + output
    return _prediction(seconds, passes, tokens, output, typical)


def _phases(
    model: PassModel, work: Generating, num_rows: int
) -> tuple[PassCost, PassCost, PassCost]:
    """The costs of the first prefill pass of `num_rows` rows, of a prefill pass halfway
    through the prompts, and of a decode pass halfway."""
    first_tokens, *others_tokens = work.chunks
    batches = split_rows(num_rows, work.each, first_tokens)
    first = others = model.prefill(batches)
    if others_tokens:
        tokens = max(1, round(sum(others_tokens) / len(others_tokens)))
        batches = split_rows(num_rows, work.each, tokens)
        others = model.prefill(batches, (first_tokens + work.prompt_tokens) / 2)
    middle = work.prompt_tokens + work.new_tokens / 2
    return first, others, model.decode(batches, middle)


def _prediction(
    seconds: float, passes: int, tokens: int, output: int, typical: PassCost
) -> Prediction:
    return Prediction(
        seconds,
        passes,
        tokens,
        output,
        pass_seconds=typical.steady,
        binds=typical.binds,
        wait_seconds=typical.time.wait,
        compute_seconds=typical.compute_seconds + typical.outside_seconds,
        busy_seconds=typical.time.busy,
    )
