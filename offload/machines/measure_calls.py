"""Measures what calls take beside what they compute: small models of two depths, scored
and completed as jobs do it. What a block more takes is a block's, the rest is not."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..model import engine_of, unwrap, wrap
from ..policy import Policy
from ..tasks.generate import generate
from ..tasks.score import score
from .machine import Calls

MODULES_OF_BLOCK = 9
"""With weights, in a block of Llama: seven products, two norms."""
_SHALLOW, _DEEP = 1, 5
_NUM_BATCHES = 16
_LENGTH = 16
_FEW_TOKENS, _NUM_STEPS = 2, 6
_ENOUGH_SECONDS = 2.0
"""That are measured: what disturbs a run of a second or two is little beside it."""
DECODE_ROWS_EACH = 4
DECODE_ROWS = _NUM_BATCHES * DECODE_ROWS_EACH


class CountingTokenizer:
    """Stands for a tokenizer where texts do not matter: the text "37" has 37 tokens,
    and no token ends a text."""

    pad_token_id = 0
    eos_token_id = None

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def __call__(self, text: str) -> dict[str, list[int]]:
        generator = torch.Generator().manual_seed(int(text))
        ids = torch.randint(1, self._vocabulary, (int(text),), generator=generator)
        return {"input_ids": ids.tolist()}

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Says nothing: nobody reads it."""
        return ""


@dataclass(frozen=True, slots=True)
class Block:
    """A block of Llama that is timed."""

    hidden: int
    intermediate: int
    heads: int


_TINY = Block(hidden=64, intermediate=128, heads=4)
LARGE = Block(hidden=1024, intermediate=2816, heads=16)


def calls(device: str, cache: Path, product: float) -> Calls:
    """Of this computer; `product` is what one product takes. Writes small models into
    the folder `cache`, which go."""
    scored = {n: _score_seconds(_TINY, n, device, cache) for n in (_SHALLOW, _DEEP)}
    module, batch = _line({n: seconds for n, (seconds, _) in scored.items()})
    job = min(first for _, first in scored.values())
    found = {}
    for coalesce in ("auto", "off"):
        policy = _policy(device, cache, coalesce=coalesce)
        found[coalesce] = _line(
            {n: _step_seconds(_TINY, n, policy) for n in (_SHALLOW, _DEEP)}
        )
    joint, step = found["auto"]
    alone, other_step = found["off"]
    # What the products themselves take is counted apart, once for all who share it.
    seven = 7 * product / MODULES_OF_BLOCK
    return Calls(
        job=job,
        product=product,
        module=max(0.0, module - seven),
        batch=batch,
        joint_module=max(0.0, joint - seven / _NUM_BATCHES),
        decode_module=max(0.0, alone - seven),
        step=min(step, other_step),
    )


def block_seconds(
    block: Block, rows: int, length: int, device: str, cache: Path
) -> tuple[float, float]:
    """Of one block for one micro-batch that is scored, its weights there; and what
    filling a byte of the working set for the first time takes beside reading it."""
    size = {"rows": rows, "length": length, "num_batches": 2}
    shallow, first = _score_seconds(block, 1, device, cache, **size)
    deep, other_first = _score_seconds(block, 5, device, cache, **size)
    nbytes = 4 * 4 * block.hidden * (4 * block.hidden + 3 * block.intermediate)
    touch = max(0.0, other_first - first) / nbytes
    return max(0.0, (deep - shallow) / 4), touch


def decode_block_seconds(block: Block, device: str, cache: Path) -> float:
    """Of one block for one more token of `DECODE_ROWS` rows in micro-batches that
    share products, for each of these micro-batches."""
    policy = _policy(device, cache)
    shallow, deep = (_step_seconds(block, n, policy) for n in (1, 3))
    return max(0.0, (deep - shallow) / 2)


def _line(seconds: dict[int, float]) -> tuple[float, float]:
    """(seconds of a module, seconds of the rest) where `seconds` is by blocks."""
    slope = (seconds[_DEEP] - seconds[_SHALLOW]) / (_DEEP - _SHALLOW)
    rest = seconds[_SHALLOW] - _SHALLOW * slope
    return max(0.0, slope) / MODULES_OF_BLOCK, max(0.0, rest)


def _score_seconds(
    block: Block,
    num_layers: int,
    device: str,
    cache: Path,
    *,
    rows: int = 1,
    length: int = _LENGTH,
    num_batches: int = _NUM_BATCHES,
) -> tuple[float, float]:
    """Of one micro-batch of `rows` x `length`, all weights there; and what the first
    job takes more than those after it."""
    tokens = rows * length
    policy = _policy(
        device, cache, micro_batch_tokens=tokens, tokens_in_flight=tokens * 8
    )
    texts = [{"id": i, "text": str(length)} for i in range(num_batches * rows)]
    with _model(block, num_layers, policy) as model:
        tokenizer = CountingTokenizer(512)
        run = partial(score, model, texts, tokenizer=tokenizer)
        first = _timed(run())
        best = least_seconds(lambda: _timed(run()), most=3)
        return best / num_batches, max(0.0, first - best)


def _step_seconds(block: Block, num_layers: int, policy: Policy) -> float:
    """Of one micro-batch and one more token of its rows."""
    texts = [{"id": i, "prompt": "8"} for i in range(_NUM_BATCHES * DECODE_ROWS_EACH)]
    with _model(block, num_layers, policy) as model:
        _generate_seconds(model, texts[:DECODE_ROWS_EACH], 2)
        few, many = (
            least_seconds(partial(_generate_seconds, model, texts, tokens), most=2)
            for tokens in (_FEW_TOKENS, _FEW_TOKENS + _NUM_STEPS)
        )
    return max(0.0, many - few) / _NUM_STEPS / _NUM_BATCHES


def _generate_seconds(model: Any, rows: list[dict[str, Any]], tokens: int) -> float:
    results = generate(
        model,
        rows,
        max_new_tokens=tokens,
        tokenizer=CountingTokenizer(512),
        do_sample=False,
    )
    return _timed(results)


def least_seconds(run: Callable[[], float], *, most: int) -> float:
    """Of `most` runs, which say how long they took; of fewer where that is enough."""
    found: list[float] = []
    while len(found) < most and sum(found) < _ENOUGH_SECONDS:
        found.append(run())
    return min(found)


def _timed(results: Iterable[Any]) -> float:
    start = time.perf_counter()
    for _ in results:
        pass
    return time.perf_counter() - start


def _policy(device: str, cache: Path, **settings: Any) -> Policy:
    return Policy(
        device=device,
        device_memory="1GiB",
        micro_batch_sequences=DECODE_ROWS_EACH,
        sequences_in_flight=_NUM_BATCHES * DECODE_ROWS_EACH,
        io={"cache": cache},
        **settings,
    )


@contextmanager
def _model(block: Block, num_layers: int, policy: Policy) -> Iterator[Any]:
    """A streamed Llama of such blocks with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=block.hidden,
        intermediate_size=block.intermediate,
        num_hidden_layers=num_layers,
        num_attention_heads=block.heads,
        num_key_value_heads=block.heads,
        vocab_size=512,
        eos_token_id=None,
        bos_token_id=None,
    )
    made = LlamaForCausalLM(config)
    made.train(False)
    made.generation_config.pad_token_id = 0
    model = wrap(made, policy)
    try:
        assert engine_of(model) is not None
        yield model
    finally:
        unwrap(model)
