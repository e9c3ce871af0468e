"""Completes rows of prompts: many sequences go on together, token by token, and share
each pass over the streamed weights."""

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, Self

import torch

from ...io.errors import PenstockError, UsageError
from ...io.user_errors import about
from ...scheduler.packing import pack
from ..adapters import without_wrapper
from ..files.parts import NumberedRows
from ..generation.caches import Caches
from ..generation.completions import Completions, Prompt
from ..generation.decoding_options import DecodingOptions
from ..generation.prompt_chunk import prompt_chunk
from ..generation.row_sampling import row_sampling, row_seed_of
from ..model import engine_of
from ..rows.limits import limits_of
from ..rows.row_error import RowError
from ..rows.text import check_row, tokenize_prompt, tokenizer_of
from ..traces.model_kind import keeps_only_keys_and_values
from .findings import Findings
from .generate_task import Generate
from .head import check_head
from .pools import prompts_pooled
from .task_progress import GenerateProgress, RowsInFlight

_MIN_FILL = 0.875
"""The least share of a micro-batch's prompt tokens that are no padding."""


def generate(
    model: Any,
    rows: Iterable[Mapping[str, Any]],
    *,
    max_new_tokens: int,
    tokenizer: Any = None,
    stop: Sequence[str] = (),
    seed: int = 0,
    progress: GenerateProgress | None = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Yields a completion for every row, in order, for a `model` from `penstock.load`.

    A row is `{"id", "prompt"}` (or `"text"`), or `{"id", "messages"}` for the
    tokenizer's chat template; a result is `{"id", "completion", "tokens",
    "finish_reason"}` or `{"id", "error"}`. `finish_reason` is `stop` where the model
    ended its text or came to one of the strings `stop`, which is cut off, and `length`
    after `max_new_tokens`.

    A row may say itself how it is completed: "max_tokens" (or "max_new_tokens"),
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "n", "stop" and
    "seed" win over the options given here, and "tools" and "chat_template_kwargs" go to
    the chat template. Other keys that model APIs know are that row's error.

    `rows` may be lazy and longer than memory. When a micro-batch of rows has ended, the
    next ones take its place. `options` are those of transformers' `generate`, such as
    `temperature` or `num_beams`, on top of the model's generation config. A row is
    sampled by a generator of its own, seeded by `seed` and its number: what it was
    batched with does not matter, but for the rounding of products of another width.
    """
    task = Generate.of(max_new_tokens=max_new_tokens, stop=stop, seed=seed, **options)
    return task.run(model, rows, tokenizer=tokenizer, progress=progress)


def check_generates(model: Any) -> None:
    """Raises UsageError for a model that generates no text."""
    if not model.can_generate():
        raise UsageError(f"{type(model).__name__} does not generate text: score it")
    check_head(model)


class _Group(NamedTuple):
    """The prompts of one micro-batch, and how many tokens of each come in with a pass
    (None: all at once)."""

    prompts: list[Prompt]
    chunk_tokens: int | None


class GenerateRunner:
    """Runs micro-batches of prompts that go on together, token by token. What is drawn
    for a row depends on its number, so that each part of a job has the same tokens
    without the others; but products shared (`coalesce`) have other last bits."""

    @classmethod
    def of(
        cls, task: Generate, model: Any, tokenizer: Any, progress: GenerateProgress
    ) -> Self:
        """For a streamed `model`; a `tokenizer` of None is the one beside its
        checkpoint. Raises UsageError where `task` does not fit the model."""
        model = without_wrapper(model)
        if task.max_new_tokens < 1:
            raise UsageError(
                f"max_new_tokens is {task.max_new_tokens}: at least 1 is generated"
            )
        check_generates(model)
        tokenizer = tokenizer or tokenizer_of(model)
        what = "the options of generate, or generation_config.json"
        with about(what, UsageError, every=True):
            completions = Completions(
                model,
                tokenizer,
                limits_of(model),
                max_new_tokens=task.max_new_tokens,
                stop=task.stop,
                seed=task.seed,
                options=task.all_options,
                note=engine_of(model).fallbacks.announce,
            )
        return cls(model, completions, progress)

    def __init__(
        self, model: Any, completions: Completions, progress: GenerateProgress
    ) -> None:
        self._engine = engine_of(model)
        self._completions = completions
        self._progress = progress
        progress.max_new_tokens = completions.way.max_new_tokens
        self._limits = limits_of(model)
        self._has_context = not model.config.is_encoder_decoder
        policy = self._engine.policy
        self._max_tokens = policy.micro_batch_tokens
        self._in_flight = policy.sequences_in_flight
        self._max_rows = min(policy.micro_batch_sequences, self._in_flight)
        self._pool_rows = prompts_pooled(policy)
        self._findings = Findings(self._in_flight // self._max_rows)
        self._pending: deque[Prompt] = deque()
        self._groups: deque[_Group] = deque()
        """The micro-batches that have not started."""
        in_parts = keeps_only_keys_and_values(model)
        self._chunk = partial(prompt_chunk, policy, in_parts=in_parts)
        self._shrinks = in_parts and policy.coalesce != "off"
        self._caches = Caches.of(self._engine, model)

    def run(self, parts: Iterator[NumberedRows]) -> Iterator[dict[str, Any]]:
        """Yields results in the order of rows."""
        # A compiled block cannot stop inside to wait for other micro-batches.
        coalesce = None if self._engine.policy.compile else True
        with (
            self._completions.defaults_taken_over(),
            self._engine.sweep(self._has_room, seed=0, coalesce=coalesce) as sweep,
        ):
            self._watch = sweep.watch
            for outcome in sweep.run(self._complete, self._micro_batches(parts)):
                if outcome.error is not None:
                    raise outcome.error  # the job's: those of rows are in results
                self._findings.take()
                yield from self._finished()
            self._findings.finish()
        yield from self._finished()

    def _has_room(self) -> bool:
        """Whether the cache and the limits have room for the next micro-batch."""
        prompts = self._groups[0].prompts if self._groups else []
        if not self._caches.has_room(prompts):
            return False
        coming = len(prompts) or self._max_rows
        return self._progress.rows_in_flight + coming <= self._in_flight

    def _finished(self) -> Iterator[dict[str, Any]]:
        while self._pending and (result := self._pending[0].result) is not None:
            self._pending.popleft()
            self._progress.rows_done += 1
            self._progress.rows_failed += "error" in result
            yield result

    def _micro_batches(self, parts: Iterator[NumberedRows]) -> Iterator[_Group]:
        for part in parts:
            rows = iter(part)
            while self._fill(rows):
                yield self._groups.popleft()
            is_done = self._pending and self._pending[-1].result is not None
            if is_done or self._engine.exchange is not None:  # all ranks do the same
                yield _Group([], None)  # so that its failed rows are yielded now

    def _fill(self, rows: Iterator[tuple[int, Mapping[str, Any]]]) -> bool:
        """Takes rows, groups prompts of similar lengths. False at the end of `rows`."""
        while not self._groups and (batch := list(islice(rows, self._pool_rows))):
            self._completions.forget_ways()
            pools: dict[tuple[DecodingOptions, int], list[Prompt]] = {}
            for prompt in [self._prompt(number, row) for number, row in batch]:
                if prompt is not None:
                    same = len(prompt.ids) if prompt.way.company == "equal" else 0
                    pools.setdefault((prompt.way, same), []).append(prompt)
            for pool in pools.values():
                self._groups += self._packed(pool)
        return bool(self._groups)

    def _packed(self, pool: list[Prompt]) -> list[_Group]:
        """Micro-batches of prompts that are decoded alike. Prompts that come in over
        several passes may have more tokens together than one call may have."""
        is_whole = self._chunk(1, 1) is None
        most = 1 if pool[0].way.company == "alone" else self._max_rows
        groups = pack(
            [len(prompt.ids) for prompt in pool],
            max_tokens=self._max_tokens if is_whole else sys.maxsize,
            max_rows=self._caches.most_rows(pool, most),
            min_fill=_MIN_FILL,
        )
        num_sharing = min(len(groups), self._in_flight // self._max_rows)
        return [
            _Group(
                [pool[index] for index in group],
                self._chunk(len(group), max(1, num_sharing)),
            )
            for group in groups
        ]

    def _prompt(self, number: int, row: Mapping[str, Any]) -> Prompt | None:
        """The prompt of a row, tokenized and checked; None if the row has failed."""
        prompt = Prompt(number, row.get("id"), self._completions.way)
        self._pending.append(prompt)
        try:
            check_row(row, answers=True)
            prompt.way = self._completions.way_for(row_sampling(row))
            prompt.seed = row_seed_of(row)
            prompt.ids = tokenize_prompt(self._completions.tokenizer, row)
            self._limits.check_ids(prompt.ids)
            self._check_length(len(prompt.ids), prompt.way.max_new_tokens)
        except RowError as error:
            prompt.fail(str(error))
            return None
        return prompt

    def _check_length(self, num_ids: int, limit: int) -> None:
        context = self._limits.context if self._has_context else None
        if context is not None and num_ids + limit > context:
            raise RowError(
                f"the prompt has {num_ids} tokens and {limit} may follow, but the "
                f"model's context is {context}: shorten it, or generate at most "
                f"{max(context - num_ids, 0)}"
            )

    def _complete(self, group: _Group) -> None:
        """Runs `group` as one micro-batch of the sweep. An exception of the model's is
        an error of its rows: rows that fail together are run again one by one, so that
        one of them does not fail the others. A PenstockError ends the job."""
        if not group.prompts:
            return
        prompts, progress = group.prompts, self._progress
        progress.micro_batches_done += 1
        in_flight = RowsInFlight(progress, len(prompts))
        try:
            with self._caches.holding(prompts), torch.inference_mode():
                finding = self._completions.run(
                    prompts,
                    self._count,
                    self._watch,
                    chunk_tokens=group.chunk_tokens,
                    leave=in_flight.leave if self._shrinks else None,
                )
        except PenstockError:
            raise
        except Exception as error:
            self._complete_alone(prompts, error)
        else:
            self._findings.add(finding, partial(_end, prompts))
        finally:
            in_flight.leave(in_flight.num)
            progress.rows_computed += len(prompts)
        lengths = [len(prompt.ids) for prompt in prompts]
        progress.prompt_tokens += sum(lengths)
        progress.tokens_padding += len(lengths) * max(lengths) - sum(lengths)

    def _complete_alone(self, prompts: Sequence[Prompt], error: Exception) -> None:
        """Completes `prompts`, which failed together, one by one."""
        if len(prompts) == 1:
            _end(prompts, error)
            return
        for prompt in prompts:
            try:
                with torch.inference_mode():
                    found = self._completions.run([prompt], self._count, self._watch)
            except PenstockError:
                raise
            except Exception as own:
                self._complete_alone([prompt], own)
            else:
                self._findings.add(found, partial(_end, [prompt]))

    def _count(self, num_rows: int) -> None:
        self._progress.output_tokens += num_rows


def _end(prompts: Sequence[Prompt], error: Exception | None) -> None:
    """With an `error`, `prompts` have failed."""
    for prompt in prompts if error is not None else ():
        prompt.fail(f"the model failed: {type(error).__name__}: {error}")
