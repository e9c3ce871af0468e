"""Models that several ranks share give what one rank gives, bit for bit."""

from __future__ import annotations

import gc
import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deep_zoo import saved
from fake_post import Office
from rank_threads import Ranks, none_failed, policy_of

import penstock
import zoo
from penstock.io.errors import PenstockError, UsageError
from penstock.offload.model import load_for
from penstock.scheduler.ranks import post
from penstock.scheduler.ranks.messages import Kind
from penstock.scheduler.ranks.stages import Address, Waits, servable
from penstock.scheduler.sweep import ranked_loop
from shares import shared

REFUSED = {
    "zamba": "share weights",
    "zamba2": "share weights",
    "gemma3n_text": "share keys and values",
    "rwkv": "states of the block before",
    "rwkv_rescaled": "states of the block before",
    "xlstm": "states of the block before",
    "albert": "share a model of 1 blocks",
    "albert_grouped": "share a model of 2 blocks",
    "funnel": "share a model of 2 blocks",
    "resnet": "share a model of 2 blocks",
    "convnext": "block 1 makes",
    "deberta_v2": "uses what an earlier block made",
    "mobilebert": "is on another rank",
    **dict.fromkeys([*zoo.names("seq2seq"), "whisper"], "what its encoder made"),
}
"""Models that ranks cannot share, and what they are told."""
STATEFUL = (
    "mamba", "falcon_mamba", "mamba2", "jamba", "bamba", "granitemoehybrid",
    "nemotron_h", "recurrent_gemma", "qwen3_next", "qwen3_5_text", "lfm2", "lfm2_moe",
    "olmo_hybrid",
)  # fmt: skip
"""Those whose caches hold more than keys and values: they are scored only."""
REFUSED_ALWAYS = ("gemma3n_text", "t5", "rwkv", "deberta_v2", "convnext", "mamba")
USUAL = ("llama", "gpt2", "mixtral", "gemma3_text", "bloom", "gpt_neo", "opt")
USUAL_OF_THREE = ("llama", "gptj", "mixtral")
COMPARED = [name for name in zoo.names() if name not in REFUSED]


def _check(name: str, num_ranks: int, folder: Path, resident: Any) -> None:
    case = zoo.ARCHITECTURES[name]
    given = [zoo.inputs(name, seed=seed) for seed in range(3)]
    policy = policy_of("4MiB", io={"reader": "threads", "cache": folder / "cache"})
    no_cache = {"use_cache": False} if name in STATEFUL else {}
    with torch.no_grad():
        wanted = [resident(**one, **no_cache)[0] for one in given]
    with Ranks(folder, num_ranks, policy) as ranks:

        def forward(rank: int, model: Any) -> list[Any]:
            with penstock.sweep(model, seed=1) as sweep:
                return sweep.map(lambda one: model(**one, **no_cache)[0], given)

        for found in none_failed(ranks.run(forward)):
            assert all(map(torch.equal, found, wanted))
        if not case.generates or name in (*STATEFUL, "xlnet"):
            return
        options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
        with torch.no_grad():
            tokens = [resident.generate(**one, **options) for one in given]

        def complete(rank: int, model: Any) -> list[Any]:
            with penstock.sweep(model, seed=1) as sweep:
                return sweep.map(lambda one: model.generate(**one, **options), given)

        for found in none_failed(ranks.run(complete)):
            assert all(map(torch.equal, found, tokens))


def test_a_hundred_architectures_are_compared() -> None:
    """By each of the next two tests with `--whole`; the others are refused by name."""
    assert len(COMPARED) >= 100


@pytest.mark.parametrize("name", shared(COMPARED, lambda _, one: one in USUAL))
def test_two_ranks_give_what_the_resident_model_gives(
    name: str, tmp_path: Path
) -> None:
    deep = 3 if name == "longcat_flash" else None
    _check(name, 2, tmp_path, saved(name, tmp_path, deep))


@pytest.mark.parametrize("name", shared(COMPARED, lambda _, one: one in USUAL_OF_THREE))
def test_three_ranks_give_what_the_resident_model_gives(
    name: str, tmp_path: Path
) -> None:
    deep = 7 if name in USUAL_OF_THREE else 4
    _check(name, 3, tmp_path, saved(name, tmp_path, deep))


@pytest.mark.parametrize(
    ("name", "why"),
    shared(
        [*REFUSED.items(), *((name, "more than keys and values") for name in STATEFUL)],
        lambda _, one: one[0] in REFUSED_ALWAYS,
    ),
)
def test_what_ranks_cannot_share_is_refused(
    name: str, why: str, tmp_path: Path
) -> None:
    saved(name, tmp_path)
    given = [zoo.inputs(name, seed=seed) for seed in range(2)]
    policy = policy_of("4MiB", io={"reader": "threads", "cache": tmp_path / "cache"})

    def forward(rank: int, model: Any) -> list[Any]:
        with penstock.sweep(model, seed=1) as sweep:
            return sweep.map(lambda one: model(**one)[0], given)

    try:
        with Ranks(tmp_path, 2, policy) as ranks:
            errors = ranks.run(forward)
    except UsageError as error:
        errors = [error]
    assert all(isinstance(error, PenstockError) for error in errors)
    assert any(why in str(error) for error in errors)


BLOCKS = 7
BATCHES = 5


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, saved("llama", folder, BLOCKS)


def _policy(folder: Path) -> penstock.Policy:
    io = {"reader": "threads", "cache": folder / "cache"}
    return policy_of("600KiB", io=io, gather_rows="1GiB")


class _Orders:
    """The same micro-batches, completed in any order of messages."""

    def __init__(self, folder: Path, resident: Any, num_ranks: int) -> None:
        rng = random.Random(5)
        generator = torch.Generator().manual_seed(1)
        self.lengths = [rng.randint(1, 4) for _ in range(BATCHES)]
        self.given = [
            torch.randint(8, 60, (1, 4), generator=generator) for _ in range(BATCHES)
        ]
        with torch.no_grad():
            self.wanted = [
                resident.generate(ids, max_new_tokens=num, do_sample=False)
                for ids, num in zip(self.given, self.lengths, strict=True)
            ]
        policy = _policy(folder)
        with penstock.load(folder, policy.model_copy(update={"ranks": None})) as alone:
            self._complete(0, alone)
            self.passes = penstock.statistics(alone).passes
        self.ranks = Ranks(folder, num_ranks, policy)

    def _complete(self, rank: int, model: Any) -> list[torch.Tensor]:
        def one(place: int) -> Any:
            return model.generate(
                self.given[place], max_new_tokens=self.lengths[place], do_sample=False
            )

        with penstock.sweep(model, width=3, seed=1) as sweep:
            return sweep.map(one, range(BATCHES))

    def play(self, seed: int) -> tuple[int, list[Any]]:
        """The most passes of a rank, by the dice of `seed`, and what each rank gave."""
        self.ranks.office.random = random.Random(seed)
        before = [penstock.statistics(model).passes for model in self.ranks.models]
        found = self.ranks.run(self._complete)
        after = [penstock.statistics(model).passes for model in self.ranks.models]
        return max(b - a for a, b in zip(before, after, strict=True)), found

    def is_right(self, found: list[Any]) -> bool:
        return all(
            not isinstance(one, BaseException)
            and all(map(torch.equal, one, self.wanted))
            for one in found
        )


@pytest.mark.parametrize(
    ("num_ranks", "seeds"),
    [
        (2, range(4)),
        (3, range(4)),
        *(
            pytest.param(num, range(first, first + 50), marks=pytest.mark.whole)
            for num in (2, 3)
            for first in range(0, 500, 50)
        ),
    ],
)
def test_any_order_of_messages_gives_the_same_in_the_same_passes(
    num_ranks: int, seeds: range, llama: tuple[Path, Any]
) -> None:
    orders = _Orders(*llama, num_ranks)
    with orders.ranks:
        for seed in seeds:
            passes, found = orders.play(seed)
            none_failed(found)
            assert orders.is_right(found)
            assert passes == orders.passes


def test_without_hold_weights_are_read_more_often(
    llama: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    orders = _Orders(*llama, 2)
    serve = servable

    def eager(waits: Waits) -> frozenset[int]:
        return serve(replace(waits, coming=()))

    with orders.ranks, monkeypatch.context() as patched:
        patched.setattr(ranked_loop, "servable", eager)
        patched.setattr(ranked_loop, "is_waited_for", lambda at, waits: False)
        passes = []
        for seed in range(3):
            num, found = orders.play(seed)
            none_failed(found)
            assert orders.is_right(found)
            passes.append(num)
    assert min(passes) >= orders.passes
    assert max(passes) > 1.25 * orders.passes


def test_without_addresses_ranks_are_wrong_or_say_so(
    llama: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: outputs of a rank are taken in the order in which they came."""
    keep = post.Mailbox._keep

    def in_order(self: Any, source: int, message: Any) -> None:
        if message.kind is Kind.OUTPUT:
            lines = self.__dict__.setdefault("lines", {})
            lines.setdefault(source, []).append(message)
        else:
            keep(self, source, message)

    def is_ready(self: Any, address: Address, source: int) -> bool:
        lines = self.__dict__.get("lines", {})
        return bool(lines.get(source)) or self._reason(address, source) is not None

    def take(self: Any, address: Address, source: int) -> Any:
        if line := self.__dict__.get("lines", {}).get(source):
            return line.pop(0)
        raise self._reason(address, source)

    orders = _Orders(*llama, 3)
    monkeypatch.setattr(post.Mailbox, "_keep", in_order)
    monkeypatch.setattr(post.Mailbox, "is_ready", is_ready)
    monkeypatch.setattr(post.Mailbox, "take", take)
    with orders.ranks:
        _, found = orders.play(0)
    assert not orders.is_right(found)


def test_a_rank_reads_its_share_of_the_weights(tmp_path: Path) -> None:
    saved("llama", tmp_path, 24)
    with penstock.load(
        tmp_path, _policy(tmp_path).model_copy(update={"ranks": None})
    ) as alone:
        whole = penstock.statistics(alone).model_bytes
    with Ranks(tmp_path, 2, _policy(tmp_path)) as ranks:
        shares = [penstock.statistics(one).model_bytes for one in ranks.models]
        ids = torch.randint(8, 60, (1, 6))
        none_failed(ranks.run(lambda rank, model: model(ids).logits))
        counted = [penstock.statistics(one).ranks for one in ranks.models]
    hidden = 4 * 6 * 48
    assert counted[1].bytes_sent == counted[1].num_sent * hidden
    assert counted[1].num_sent >= 10
    assert counted[0].num_ranks == 2
    assert counted[0].bytes_sent > 12 * hidden  # the logits, too
    assert max(shares) <= (1 / 2 + 0.02) * whole


def test_a_rank_whose_model_is_dropped_gives_back_its_threads(tmp_path: Path) -> None:
    saved("llama", tmp_path / "model", 4)
    before = set(threading.enumerate())
    posts = Office(2, 0).posts
    models = [
        load_for("any", tmp_path / "model", policy_of(), post=each) for each in posts
    ]
    assert set(threading.enumerate()) > before
    models.clear()
    gc.collect()
    assert set(threading.enumerate()) <= before
