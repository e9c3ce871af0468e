"""Measures the overhead of calls: the time beside matrix products and attention.

Small models of two depths run jobs. The difference of their times is the time of the
additional blocks; the rest of the time belongs to the micro-batch or the job.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..model import engine_of, unwrap, wrap
from ..policy import Policy
from ..tasks.generate import generate
from ..tasks.score import score
from .machine import Calls
from .rounds import rounds

MODULES_OF_BLOCK = 9
"""Modules with weights in a block of Llama: seven matrices and two norms."""
VOCABULARY = 512
_NUM_BATCHES = 16
_LENGTH = 16
_ROWS_EACH = 4
_NUM_STEPS = 8


class CountingTokenizer:
    """A tokenizer for jobs whose text does not matter. The text "37" has 37 tokens, and
    no token ends a text."""

    pad_token_id = 0
    eos_token_id = None

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def __call__(self, text: str) -> dict[str, list[int]]:
        generator = torch.Generator().manual_seed(int(text))
        ids = torch.randint(1, self._vocabulary, (int(text),), generator=generator)
        return {"input_ids": ids.tolist()}

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Returns an empty string: nobody reads it."""
        return ""


@dataclass(frozen=True, slots=True)
class Block:
    """The sizes of a block of Llama that is timed."""

    hidden: int
    intermediate: int
    heads: int

    def model(self, num_layers: int) -> Any:
        """A Llama of `num_layers` such blocks, with random weights and no end token."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            architectures=["LlamaForCausalLM"],
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=num_layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            vocab_size=VOCABULARY,
            eos_token_id=None,
            bos_token_id=None,
        )
        made = LlamaForCausalLM(config)
        made.train(False)
        made.generation_config.pad_token_id = 0
        return made


_TINY = Block(hidden=64, intermediate=128, heads=4)


@dataclass(frozen=True, slots=True)
class TwoDepths:
    """One model with few blocks, and one with more of the same blocks."""

    shallow: Any
    deep: Any
    num_more: int
    """How many more blocks the deep model has."""

    def per_block(self, run: Callable[[Any], float]) -> float:
        """The seconds that one block adds to `run`.

        The median of several rounds. Each round runs both depths, so that a busy moment
        slows both.
        """
        return max(0.0, median(self.once(run) for _ in rounds()))

    def once(self, run: Callable[[Any], float]) -> float:
        """The seconds that one block adds to `run`, from one round."""
        shallow = run(self.shallow)
        return (run(self.deep) - shallow) / self.num_more


def calls(device: str, cache: Path, product: float) -> Calls:
    """Measures the overheads of this computer, except those of decoding with shared
    matrix products.

    `product` is the seconds of one matrix product. Writes small models into the folder
    `cache`.
    """
    tokens = {"micro_batch_tokens": _LENGTH, "tokens_in_flight": 8 * _LENGTH}
    with two_depths(_TINY, jobs_policy(device, cache, **tokens)) as models:

        def scored(model: Any) -> float:
            return score_seconds(model, _NUM_BATCHES, _LENGTH) / _NUM_BATCHES

        first = _NUM_BATCHES * scored(models.shallow)
        scored(models.deep)
        module = models.per_block(scored)
        usual = median(scored(models.shallow) for _ in rounds())
    with two_depths(_TINY, jobs_policy(device, cache, coalesce="off")) as models:

        def completed(model: Any, steps: int = _NUM_STEPS) -> float:
            num_rows = _NUM_BATCHES * _ROWS_EACH
            return generate_seconds(model, num_rows, steps) / _NUM_BATCHES

        completed(models.deep)
        alone = models.per_block(completed) / _NUM_STEPS
        more = median(
            completed(models.shallow, 2 * _NUM_STEPS) - completed(models.shallow)
            for _ in rounds()
        )
    # The products' own time is counted separately, once for all micro-batches in them.
    seven = 7 * product
    return Calls(
        job=max(0.0, first - _NUM_BATCHES * usual),
        product=product,
        module=max(0.0, module - seven) / MODULES_OF_BLOCK,
        batch=max(0.0, usual - module),
        decode_module=max(0.0, alone - seven) / MODULES_OF_BLOCK,
        step=max(0.0, more / _NUM_STEPS - alone),
    )


def score_seconds(model: Any, num_rows: int, length: int) -> float:
    """The seconds of a job that scores `num_rows` texts of `length` tokens."""
    texts = [{"id": i, "text": str(length)} for i in range(num_rows)]
    return _timed(score(model, texts, tokenizer=CountingTokenizer(VOCABULARY)))


def generate_seconds(model: Any, num_rows: int, tokens: int) -> float:
    """The seconds of a job that completes `num_rows` prompts of one token by `tokens`
    tokens. So each pass is one decoding step."""
    results = generate(
        model,
        [{"id": i, "prompt": "1"} for i in range(num_rows)],
        max_new_tokens=tokens,
        tokenizer=CountingTokenizer(VOCABULARY),
        do_sample=False,
    )
    return _timed(results)


def _timed(results: Iterable[Any]) -> float:
    start = time.perf_counter()
    for _ in results:
        pass
    return time.perf_counter() - start


def jobs_policy(device: str, cache: Path, **settings: Any) -> Policy:
    """A policy for timing jobs: all weights stay in the working set after the first
    pass. So the speed of the reader does not matter, and none is measured or
    remembered."""
    return Policy(
        device=device,
        io={"cache": cache, "reader": "threads"},
        **{
            "device_memory": "1GiB" if device == "cpu" else "auto",
            "micro_batch_sequences": _ROWS_EACH,
            "sequences_in_flight": _NUM_BATCHES * _ROWS_EACH,
            **settings,
        },
    )


@contextmanager
def two_depths(
    block: Block, policy: Policy, *, shallow: int = 1, deep: int = 5
) -> Iterator[TwoDepths]:
    """Streamed models with `shallow` and with `deep` blocks."""
    with _model(block, shallow, policy) as few, _model(block, deep, policy) as many:
        yield TwoDepths(few, many, deep - shallow)


@contextmanager
def _model(block: Block, num_layers: int, policy: Policy) -> Iterator[Any]:
    """A streamed model; it is unwrapped at the end."""
    model = wrap(block.model(num_layers), policy)
    try:
        assert engine_of(model) is not None
        yield model
    finally:
        unwrap(model)
