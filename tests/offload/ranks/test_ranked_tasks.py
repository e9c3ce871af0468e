"""What tasks yield on every rank is what they yield on one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from deep_zoo import saved
from rank_threads import Ranks, none_failed, policy_of

import penstock
from common.id_tokenizer import Numbers
from penstock import Policy
from penstock.offload.model import engine_of

ROWS = 14


def rows(key: str) -> list[dict[str, Any]]:
    rng = random.Random(3)
    found = []
    for number in range(ROWS):
        ids = [rng.randint(8, 150) for _ in range(rng.randint(2, 12))]
        words = " ".join(map(str, ids))
        found.append({"id": number, key: words})
    return found


def one_policy(folder: Path, **values: Any) -> Policy:
    io = {"reader": "threads", "cache": folder / "cache"}
    counts = {
        "micro_batch_tokens": 24,
        "tokens_in_flight": 96,
        "micro_batch_sequences": 3,
        "sequences_in_flight": 9,
    }
    return policy_of("600KiB", io=io, **{**counts, **values})


SAMPLED: dict[str, Any] = {"seed": 3, "temperature": 1.5, "do_sample": True}
TASKS: dict[str, Callable[[Any], Iterator[dict[str, Any]]]] = {
    "score": lambda model: penstock.score(
        model, rows("text"), tokenizer=Numbers(), window=8
    ),
    "generate": lambda model: penstock.generate(
        model, rows("prompt"), max_new_tokens=5, tokenizer=Numbers()
    ),
    "sample": lambda model: penstock.generate(
        model, rows("prompt"), max_new_tokens=4, tokenizer=Numbers(), **SAMPLED
    ),
    "embed": lambda model: penstock.embed(model, rows("text"), tokenizer=Numbers()),
    "classify": lambda model: penstock.classify(
        model, rows("prompt"), labels=[" 9 10", " 11"], tokenizer=Numbers()
    ),
}  # fmt: skip


def _alone(folder: Path, policy: Policy, task: str) -> list[dict[str, Any]]:
    with penstock.load(folder, policy.model_copy(update={"ranks": None})) as model:
        return list(TASKS[task](model))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    saved("llama", folder, 5)
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_tasks_yield_the_same_on_each_rank(task: str, llama: Path) -> None:
    policy = one_policy(llama, coalesce="off" if task == "sample" else "auto")
    wanted = _alone(llama, policy, task)
    assert not any("error" in row for row in wanted)
    with Ranks(llama, 2, policy) as ranks:
        found = none_failed(ranks.run(lambda rank, model: list(TASKS[task](model))))
    assert found == [wanted, wanted]


def test_ranks_share_products_too(llama: Path) -> None:
    """Each joins those of its part of the micro-batches in flight."""
    policy = one_policy(llama, micro_batch_sequences=1, sequences_in_flight=8)
    with Ranks(llama, 2, policy) as ranks:
        none_failed(ranks.run(lambda rank, model: list(TASKS["generate"](model))))
        joint = [penstock.statistics(one).rows_per_joint_call for one in ranks.models]
    assert min(joint) > 2.5


@pytest.mark.parametrize("kv", [{"tier": "host"}, {"tier": "disk"}])
def test_keys_and_values_may_be_in_tiers(kv: dict[str, str], llama: Path) -> None:
    policy = one_policy(llama, kv=kv)
    with Ranks(llama, 2, policy) as ranks:
        found = none_failed(
            ranks.run(lambda rank, model: list(TASKS["generate"](model)))
        )
    assert found[0] == found[1] == _alone(llama, policy, "generate")


def test_experts_are_loaded_where_their_block_is(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path, 5)
    policy = one_policy(tmp_path).model_copy(update={"device_memory": 160 << 10})
    wanted = _alone(tmp_path, policy, "generate")
    with Ranks(tmp_path, 2, policy) as ranks:
        found = none_failed(
            ranks.run(lambda rank, model: list(TASKS["generate"](model)))
        )
        touched = [
            penstock.statistics(one).expert_bytes_touched for one in ranks.models
        ]
    assert found == [wanted, wanted]
    assert all(touched)


def test_a_row_that_fails_on_one_rank_fails_on_all(llama: Path) -> None:
    """It is tried alone on all of them, and the others of its micro-batch are done."""
    policy = one_policy(llama)
    lengths = [len(row["text"].split()) for row in rows("text")]
    bad = max(lengths)

    def fail(module: Any, args: Any, output: Any) -> None:
        if output.shape[1] == bad:
            raise RuntimeError("too long for this card")

    with Ranks(llama, 2, policy) as ranks:
        ranks.models[1].model.layers[1].mlp.register_forward_hook(fail)
        found = none_failed(
            ranks.run(
                lambda rank, model: list(
                    penstock.score(model, rows("text"), tokenizer=Numbers())
                )
            )
        )
    for rank, results in enumerate(found):
        failed = ["error" in row for row in results]
        assert failed == [length == bad for length in lengths]
        message = next(row["error"] for row in results if "error" in row)
        assert "too long for this card" in message
        assert ("on rank 1: " in message) == (rank == 0)


def _sent(ranks: Ranks, work: Callable[[int, Any], Any]) -> list[int]:
    """The bytes that each rank sends while it does `work`."""
    before = [penstock.statistics(one).ranks.bytes_sent for one in ranks.models]
    none_failed(ranks.run(work))
    after = [penstock.statistics(one).ranks.bytes_sent for one in ranks.models]
    return [b - a for a, b in zip(before, after, strict=True)]


def test_only_what_other_ranks_need_crosses(llama: Path) -> None:
    """A rank that does not have the head gets tokens in a job, and the last position's
    logits in a program of the user's."""
    prompts, new, rows = 6, 4, 3
    ids = torch.randint(8, 150, (rows, prompts))
    given = [{"prompt": " ".join(map(str, row))} for row in ids.tolist()]
    options: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new}
    with Ranks(llama, 2, one_policy(llama)) as ranks:
        stages = ranks.models[0].config.num_hidden_layers
        exchange = engine_of(ranks.models[0]).exchange
        assert exchange is not None
        owners = exchange.stages.owners
        width, vocabulary = (ranks.models[0].lm_head.weight.shape[at] for at in (1, 0))
        job = _sent(
            ranks,
            lambda rank, model: list(
                penstock.generate(
                    model,
                    given,
                    max_new_tokens=new,
                    tokenizer=Numbers(),
                    min_new_tokens=new,
                )
            ),
        )
        user = _sent(
            ranks,
            lambda rank, model: model.generate(ids, do_sample=False, **options),
        )
    tokens = rows * (prompts + new - 1)
    hops = [
        sum(a == rank != b for a, b in pairwise(owners[1 : stages + 1]))
        for rank in range(2)
    ]
    hidden = [4 * width * tokens * num for num in hops]
    assert job == [hidden[0] + new * rows * 3 * 8, hidden[1]]
    assert user == [hidden[0] + new * rows * vocabulary * 4, hidden[1]]


def test_prompts_and_tokens_of_any_size_share_a_pass(llama: Path) -> None:
    """A hybrid schedule falls out of the one rule: while some micro-batches decode, one
    that takes the place of another runs its prompt at the same visit of each block."""
    policy = one_policy(llama, sequences_in_flight=6, coalesce="off")
    given = [
        {**row, "max_tokens": 2 + 2 * (row["id"] % 3)} for row in rows("prompt")[:12]
    ]

    def complete(rank: int, model: Any) -> list[Any]:
        return list(
            penstock.generate(model, given, max_new_tokens=9, tokenizer=Numbers())
        )

    def watch(model: Any, block: int) -> dict[int, set[tuple[int, ...]]]:
        """By pass: rows and tokens of the calls of `block`."""
        seen: dict[int, set[tuple[int, ...]]] = {}

        def note(module: Any, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            seen.setdefault(penstock.statistics(model).passes, set()).add(
                tuple(hidden.shape[:2])
            )

        model.model.layers[block].register_forward_pre_hook(note, with_kwargs=True)
        return seen

    with penstock.load(llama, policy.model_copy(update={"ranks": None})) as model:
        wanted, passes = complete(0, model), penstock.statistics(model).passes
    with Ranks(llama, 2, policy) as ranks:
        exchange = engine_of(ranks.models[0]).exchange
        assert exchange is not None
        blocks = [exchange.stages.owners[1:].index(rank) for rank in range(2)]
        seen = [watch(*pair) for pair in zip(ranks.models, blocks, strict=True)]
        assert none_failed(ranks.run(complete)) == [wanted, wanted]
        assert all(penstock.statistics(one).passes <= passes for one in ranks.models)
    for calls in seen:
        kinds = [{tokens > 1 for _, tokens in shapes} for shapes in calls.values()]
        assert kinds.count({True, False}) >= 2
        assert len({rows for shapes in calls.values() for rows, _ in shapes}) > 1
