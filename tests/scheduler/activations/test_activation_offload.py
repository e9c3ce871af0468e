"""With `activations: host` suspended micro-batches leave the device, and nobody can
tell: not they, nor whoever else refers to what they hold."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import penstock
import zoo
from nets import (
    WIDTH,
    Block,
    Net,
    assert_usable,
    batches,
    make,
    same,
    serially,
    streamed,
)
from penstock import Policy
from penstock.offload.engine import tiers
from shares import shared

pytestmark = [pytest.mark.usefixtures("no_leaks"), pytest.mark.slow]


@pytest.fixture(autouse=True)
def everything_is_worth_it(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers, "MIN_BYTES", 1)
    if "all_objects" not in request.fixturenames:
        request.getfixturevalue("few_objects")


def out_and_in(model: Any) -> tuple[int, int]:
    found = penstock.statistics(model)
    return found.activation_bytes_out, found.activation_bytes_in


@pytest.mark.parametrize(
    ("num_batches", "width"),
    shared(
        [(num, width) for num in (1, 2, 7) for width in (None, 1, 2, 3)],
        lambda _, case: case in ((1, 3), (2, None), (7, None), (7, 2), (7, 3)),
    ),
)
def test_results_are_bit_identical(num_batches: int, width: int | None) -> None:
    net = make(Net)
    items = batches(num_batches)
    expected = serially(net, items)
    with streamed(net, activations="host"):
        with penstock.sweep(net, width=width) as sweep:
            assert same(sweep.map(net, items), expected)
        bytes_out, bytes_in = out_and_in(net)
        assert_usable(net, net, expected)
    assert bytes_out >= bytes_in
    if num_batches == 7:
        assert (bytes_in > 0) == (width in (None, 3))  # two are neighbours always


def test_on_the_device_nothing_is_moved() -> None:
    net = make(Net)
    with streamed(net), penstock.sweep(net) as sweep:
        sweep.map(net, batches(7))
        assert out_and_in(net) == (0, 0)


def generated(name: str, folder: Path, num: int, **policy: Any) -> tuple[Any, Any, Any]:
    """What a model generates in a sweep, what it generates alone, and the
    statistics."""
    zoo.save_checkpoint(name, folder)
    items = [zoo.inputs(name, seed=seed) for seed in range(num)]
    how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    alone = zoo.load(name, folder)
    with torch.inference_mode():
        expected = [alone.generate(**item, **how) for item in items]
    settings = {"device_memory": "300KiB", "resident_below": 1, **policy}
    with (
        penstock.load(folder, Policy(**settings)) as model,
        penstock.sweep(model) as sweep,
    ):
        found = sweep.map(lambda item: model.generate(**item, **how), items)
        return found, expected, penstock.statistics(model)


@pytest.mark.parametrize(
    "name",
    shared(["llama", "gpt2", "mixtral", "t5", "mamba"], lambda n, _: n in (0, 4)),
)
def test_generate_with_its_caches_is_bit_identical(name: str, tmp_path: Path) -> None:
    found, expected, statistics = generated(name, tmp_path, 4, activations="host")
    assert same(found, expected)
    assert statistics.activation_bytes_in > 10 * 4 * 2 * 9 * 48 * 4  # hidden states
    assert statistics.num_activation_buffers <= 24


# What stays on the device, and for how long.


class Watching(Block):
    """Sees how much is on the device of what all blocks have put out."""

    made: ClassVar[list[weakref.ref[torch.Tensor]]] = []
    most = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        alive = [tensor for ref in Watching.made if (tensor := ref()) is not None]
        there = [tensor.untyped_storage().nbytes() for tensor in alive]
        Watching.most = max(Watching.most, sum(there))
        del alive
        found = super().forward(x)
        Watching.made.append(weakref.ref(found))
        return found


@pytest.mark.parametrize(
    ("where", "least", "most"), [("device", 12, 12), ("host", 1, 3)]
)
def test_the_device_holds_who_computes_and_its_neighbours(
    where: str, least: int, most: int
) -> None:
    net = make(Net)
    net.blocks = nn.ModuleList(make(Watching) for _ in range(3))
    items = batches(12)
    expected = serially(net, items)
    Watching.made.clear()
    Watching.most = 0
    with streamed(net, activations=where), penstock.sweep(net) as sweep:
        assert same(sweep.map(lambda x: net(x), items), expected)
    one = items[0].nbytes
    assert least * one <= Watching.most <= most * one


def test_buffers_are_used_again() -> None:
    net = make(Net)
    with streamed(net, activations="host"), penstock.sweep(net, width=6) as sweep:
        sweep.map(net, batches(12))
        before = penstock.statistics(net)
        sweep.map(net, batches(30))
        after = penstock.statistics(net)
    assert 0 < before.num_activation_buffers <= 6
    assert after.num_activation_buffers == before.num_activation_buffers
    assert after.activation_bytes_out > 2 * before.activation_bytes_out


# What is not a micro-batch's alone.


class Elsewhere:
    """Whatever of a micro-batch's somebody else refers to."""

    def __init__(self) -> None:
        self.kept: list[Any] = []


GLOBAL = Elsewhere()


def keep_in_a_list(kept: Elsewhere, net: Any, h: torch.Tensor) -> Any:
    kept.kept.append(h)
    return h


def keep_a_view(kept: Elsewhere, net: Any, h: torch.Tensor) -> Any:
    kept.kept.append(h[1:])
    return h


def keep_its_storage(kept: Elsewhere, net: Any, h: torch.Tensor) -> Any:
    kept.kept.append(h.untyped_storage())
    return h


def keep_what_holds_it(kept: Elsewhere, net: Any, h: torch.Tensor) -> Any:
    box = {"h": [h]}
    kept.kept.append(box)
    return box


def keep_in_the_module(kept: Elsewhere, net: Any, h: torch.Tensor) -> Any:
    name = f"last_{len(kept.kept)}"
    setattr(net.head, name, h)
    kept.kept.append(net.head)
    return h


def keep_in_a_function(kept: Elsewhere, net: Any, h: torch.Tensor) -> Any:
    kept.kept.append(lambda: h)
    return h


def keep_for_autograd(kept: Elsewhere, net: Any, h: torch.Tensor) -> Any:
    weight = torch.ones(WIDTH, requires_grad=True)
    with torch.inference_mode(False), torch.enable_grad():
        mine = h.clone()
        kept.kept.append((mine * weight).sum())
    return mine


KEEPERS = [
    keep_in_a_list,
    keep_a_view,
    keep_its_storage,
    keep_what_holds_it,
    keep_in_the_module,
    keep_in_a_function,
    keep_for_autograd,
]


@pytest.mark.parametrize(
    ("keep", "is_first_time"),
    shared(
        [(keep, is_first) for keep in KEEPERS for is_first in (True, False)],
        lambda n, _: n == 0 or n % 4 == 1,
    ),
)
def test_what_others_refer_to_stays(
    keep: Callable[..., Any], is_first_time: bool
) -> None:
    """Also once it was seen that nobody does."""
    net = make(Net)
    others = Elsewhere()
    sizes: list[int] = []

    def fn(item: tuple[bool, torch.Tensor]) -> Any:
        keeps, x = item
        h = x * 2
        mine = h if keep is not keep_for_autograd else None
        held = keep(others if keeps else Elsewhere(), net, h)
        size = torch.zeros(1)  # written by nobody else
        del h, mine
        found = net(x)
        for tensor in tensors_of(held):
            sizes.append(tensor.untyped_storage().nbytes())
            found = found + tensor.detach().sum() + size
        return found

    def look(x: torch.Tensor) -> Any:
        """Another one, which sees all that are kept, while they wait."""
        for kept in others.kept:
            for tensor in tensors_of(kept):
                sizes.append(tensor.untyped_storage().nbytes())
        found = net(x)
        for kept in others.kept:
            for tensor in tensors_of(kept):
                sizes.append(tensor.untyped_storage().nbytes())
        return found

    def run(item: Any) -> Any:
        return fn(item) if isinstance(item, tuple) else look(item)

    xs = batches(9)
    items: list[Any] = [*((True, x) for x in xs[:4]), *xs[4:]]
    with streamed(net, activations="host"):
        with penstock.sweep(net) as sweep:
            if not is_first_time:
                sweep.map(run, [(False, x) for x in xs[:4]])
            found = sweep.map(run, items)
        alone = [run(item) for item in items]
        assert all(sizes)
        assert same([f.detach() for f in found], [a.detach() for a in alone])
    others.kept.clear()


def tensors_of(kept: Any) -> Iterator[torch.Tensor]:
    if isinstance(kept, torch.Tensor):
        yield kept
    elif isinstance(kept, dict):
        yield from kept["h"]
    elif isinstance(kept, nn.Module):
        yield from (v for k, v in vars(kept).items() if k.startswith("last_"))
    elif isinstance(kept, torch.UntypedStorage):
        yield torch.empty(0, dtype=torch.uint8).set_(kept)
    elif callable(kept):
        yield kept()


@pytest.mark.usefixtures("all_objects")
@pytest.mark.parametrize("how", ["batch", "closure", "global", "argument"])
def test_what_all_share_stays(how: str) -> None:
    """Such as the cache of a common prefix."""
    net = make(Net)
    prefix = torch.ones(4, WIDTH)
    GLOBAL.kept = [prefix]

    def read(item: tuple[int, torch.Tensor], shared: Any) -> torch.Tensor:
        nbytes = shared.untyped_storage().nbytes()
        assert nbytes == 4 * WIDTH * 4  # what is away cannot even be printed
        total = float(shared.sum())
        if item[0] != 1:  # the others must not look like its owners, too
            del shared
        found: torch.Tensor = net(item[1])
        return found * total

    def fn(item: Any) -> torch.Tensor:
        if how == "batch":
            return read(*item)
        if how == "closure":
            return read(item, prefix)
        return read(item, GLOBAL.kept[0])

    items = list(enumerate(batches(6)))
    expected = serially(partial(read, shared=prefix), items)
    given: list[Any] = [(x, prefix) for x in items] if how == "batch" else items
    with streamed(net, activations="host"), penstock.sweep(net) as sweep:
        if how == "argument":
            found = sweep.map(partial(read, shared=prefix), items)
        else:
            found = sweep.map(fn, given)
        assert out_and_in(net)[1] > 0
    GLOBAL.kept.clear()
    assert same(found, expected)


# When it does not end well.


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_who_is_ended_finds_everything_it_held(kind: type[BaseException]) -> None:
    net = make(Net)
    expected = serially(net, batches(3))
    seen: list[bool] = []

    def fn(number: int) -> None:
        mine = torch.full((3, WIDTH), float(number))
        again = {"deep": [mine.view(-1)]}
        try:
            net(batches(1)[0])
            if number == 2:
                raise kind
            for _ in range(3):
                net(batches(1)[0])
            if number == 3:
                raise RuntimeError
        finally:
            seen.append(bool((mine == number).all() and again["deep"][0][5] == number))

    with streamed(net, activations="host"):
        with penstock.sweep(net, width=5) as sweep:
            run = sweep.run(fn, range(8))
            if kind is KeyboardInterrupt:
                with pytest.raises(KeyboardInterrupt):
                    list(run)
            else:
                next(run)
                run.close()
            assert same(sweep.map(net, batches(3)), expected)
        assert out_and_in(net)[1] > 0
        assert_usable(net, net, expected)
    assert len(seen) >= 5
    assert all(seen)


def test_memory_of_numpy_or_shared_with_it_stays() -> None:
    net = make(Net)

    def fn(x: torch.Tensor) -> Any:
        mine = x + 1
        array = mine.numpy()
        other = torch.from_numpy(array.copy())
        found = net(x)
        return found + mine.sum() + other.sum() + float(array.sum())

    expected = serially(fn, batches(6))
    with streamed(net, activations="host"), penstock.sweep(net) as sweep:
        assert same(sweep.map(fn, batches(6)), expected)


def test_what_was_walked_is_not_kept_alive() -> None:
    net = make(Net)
    gc.collect()
    gc.disable()
    try:
        alive: list[weakref.ref[torch.Tensor]] = []

        def fn(x: torch.Tensor) -> Any:
            mine = x + 1
            alive.append(weakref.ref(mine))
            net(x)
            del mine
            return net(x)

        with streamed(net, activations="host"), penstock.sweep(net) as sweep:
            sweep.map(fn, batches(5))
            assert [ref() for ref in alive] == [None] * 5
    finally:
        gc.enable()
