"""Blocks are compiled once for all that are alike, and nothing else changes."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import penstock
from nets import WIDTH, batches, make, open_sites, same, serially
from nets import streamed as streamed_eagerly
from penstock import Policy
from penstock.offload.model import engine_of

dynamo = pytest.importorskip("torch._dynamo")
inductor = pytest.importorskip("torch._inductor")
# A module of its own, imported once a policy asks for it.
from penstock.offload.engine import compilation  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leaks")]

streamed = functools.partial(streamed_eagerly, compile=True)
torchs_compiler = compilation.compile_graph
Graphs = list[torch.fx.GraphModule]


class Block(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = x + torch.tanh(self.linear(self.norm(x)))
        return found


class Stack(nn.Module):
    """Blocks in a row: all sites are alike."""

    def __init__(self, kind: Callable[[], nn.Module] = Block, num: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(num))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def replaced(module: nn.Module) -> list[nn.Module]:
    """The modules whose forward is not their class's own."""
    return [part for part in module.modules() if "forward" in vars(part)]


def hidden(num: int, rows: int = 2) -> list[torch.Tensor]:
    """Batches as a layer gives them under inference mode, to the first block too."""
    with torch.inference_mode():
        return [x.clone() for x in batches(num, rows)]


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """What is compiled, by a compiler that keeps each graph and runs it as it is."""
    found: Graphs = []

    def compile_graph(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(compilation, "compile_graph", compile_graph)
    # pytest would keep its records, with tracebacks, and those keep weights alive.
    log = logging.getLogger("torch._dynamo.convert_frame")
    monkeypatch.setattr(log, "disabled", True)
    dynamo.reset()
    yield found
    found.clear()
    dynamo.reset()


# One graph.


@pytest.mark.parametrize("width", [None, 1, 3])
def test_equal_blocks_share_one_graph_wherever_their_weights_stand(
    graphs: Graphs, width: int | None
) -> None:
    net = make(Stack)
    items = hidden(5)
    expected = serially(net, items)
    with streamed(net, slots=3):
        for _ in range(4):  # six units in turn, in room for a few
            with penstock.sweep(net, width=width) as sweep:
                assert same(sweep.map(net, items), expected)
        built = engine_of(net)._binding._built
        assert len({(unit, offset) for unit, offset, _ in built}) > len(net.blocks)
        assert penstock.statistics(net).fallbacks == ()
    assert len(graphs) == 1


def test_plain_calls_use_the_graph_of_the_sweep(graphs: Graphs) -> None:
    net = make(Stack)
    items = hidden(3)
    expected = serially(net, items)
    with streamed(net):
        with torch.inference_mode(), penstock.sweep(net) as sweep:
            assert same(sweep.map(net, items), expected)
        assert_usable_hidden(net, items, expected)
    assert len(graphs) == 1


def test_other_shapes_get_one_more_graph_for_all_sizes(graphs: Graphs) -> None:
    net = make(Stack)
    items = [x for rows in (2, 3, 5, 7, 11) for x in hidden(2, rows)]
    expected = serially(net, items)
    with streamed(net), penstock.sweep(net) as sweep:
        assert same(sweep.map(net, items), expected)
    assert len(graphs) == 2


def test_blocks_of_other_shapes_have_graphs_of_their_own(graphs: Graphs) -> None:
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.ModuleList(Block() for _ in range(3))
            self.narrow = nn.ModuleList(Block(WIDTH // 2) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.wide:
                x = block(x)
            x = x[:, ::2].contiguous()
            for block in self.narrow:
                x = block(x)
            return x

    net = make(Uneven)
    items = hidden(3)
    expected = serially(net, items)
    with streamed(net), penstock.sweep(net) as sweep:
        assert same(sweep.map(net, items), expected)
    assert len(graphs) == 2


def test_every_model_has_dynamos_recompile_limit_to_itself(graphs: Graphs) -> None:
    num = dynamo.config.recompile_limit + 2
    for _ in range(num):
        net = make(Stack)
        items = hidden(1)
        expected = serially(net, items)
        with streamed(net), penstock.sweep(net) as sweep:
            assert same(sweep.map(net, items), expected)
            assert penstock.statistics(net).fallbacks == ()
    assert len(graphs) == num


def test_each_micro_batch_keeps_its_own_modes(graphs: Graphs) -> None:
    net = make(Stack)

    def run(item: tuple[int, torch.Tensor]) -> Any:
        number, x = item
        with torch.autocast("cpu", torch.bfloat16, enabled=number % 2 == 1):
            first = net(x)
        with torch.inference_mode(number % 3 != 0), torch.no_grad():
            return first, net(x), torch.is_inference_mode_enabled()

    items = list(enumerate(hidden(6)))
    expected = serially(run, items)
    with streamed(net):
        for width in (None, 2):
            with penstock.sweep(net, width=width) as sweep:
                assert same(sweep.map(run, items), expected)
            assert not torch.is_autocast_enabled("cpu")
        assert penstock.statistics(net).fallbacks == ()


def test_layers_with_a_cache_share_their_graphs(graphs: Graphs) -> None:
    """Each attention reads its layer's number, which alone would make them differ."""
    transformers = pytest.importorskip("transformers")

    def llama(num_layers: int) -> Any:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            bos_token_id=1,
            pad_token_id=0,
            eos_token_id=None,
        )
        return transformers.LlamaForCausalLM(config).eval()

    def generate(model: Any, ids: torch.Tensor) -> Any:
        mask = torch.ones_like(ids)
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=4, do_sample=False
        )

    counted = []
    items = [torch.arange(10).view(2, 5) + i for i in range(3)]
    for num_layers in (3, 10):
        graphs.clear()
        model = llama(num_layers)
        expected = serially(functools.partial(generate, model), items)
        with streamed(model, slots=40), penstock.sweep(model) as sweep:
            found = sweep.map(functools.partial(generate, model), items)
            assert same(found, expected)
            assert penstock.statistics(model).fallbacks == ()
        counted.append(len(graphs))
    assert counted[0] == counted[1]


# What is compiled, and what is put back.


def test_nothing_is_compiled_unless_asked(graphs: Graphs) -> None:
    net = make(Stack)
    with streamed_eagerly(net), penstock.sweep(net) as sweep:
        sweep.map(net, hidden(2))
        assert replaced(net) == []
    assert graphs == []


class Nested(Block):
    """Holds a module that others use, too: a site inside of a site."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.shared = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.shared(super().forward(x))
        return found


class Sharing(Stack):
    def __init__(self) -> None:
        shared = nn.Linear(WIDTH, WIDTH)
        super().__init__(lambda: Nested(shared), 3)
        self.shared = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.shared(x))


def test_a_site_with_another_site_inside_is_not_compiled() -> None:
    net = make(Sharing)
    items = hidden(4)
    expected = serially(net, items)
    with streamed(net, slots=4):
        assert not set(replaced(net)) & set(net.blocks)
        with penstock.sweep(net) as sweep:
            assert same(sweep.map(net, items), expected)


class Calling(Block):
    """Calls a site that it does not contain."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.others = [other]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = super().forward(x) + self.others[0](x)
        return found


@pytest.mark.parametrize("width", [None, 1])
def test_a_switch_inside_of_a_compiled_block_is_harmless(width: int | None) -> None:
    class Net(Sharing):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Calling(self.shared) for _ in range(4))

    net = make(Net)
    items = hidden(4)
    expected = serially(net, items)
    with streamed(net, slots=3), penstock.sweep(net, width=width) as sweep:
        assert same(sweep.map(net, items), expected)
        assert open_sites(net) == []


class Reading(Calling):
    """Reads weights of a site that it does not contain, which is a fault."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = Block.forward(self, x)
        if self.is_broken:
            dynamo.graph_break()
        weight: Any = self.others[0].weight
        found: torch.Tensor = x * weight[0] + torch.tanh(weight[1])
        return found

    is_broken = False


class Breaking(Reading):
    is_broken = True


@pytest.mark.parametrize("kind", [Reading, Breaking])
@pytest.mark.parametrize("slots", [2, 8])
def test_weights_read_outside_of_their_site_are_found_by_their_fault(
    kind: type[Reading], slots: int
) -> None:
    class Net(Sharing):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(kind(self.shared) for _ in range(3))

    net = make(Net)
    items = hidden(3)
    expected = serially(net, items)
    with streamed(net, slots=slots), penstock.sweep(net, width=1) as sweep:
        assert same(sweep.map(net, items), expected)
        assert set(penstock.statistics(net).faults) == {"shared.weight"}


def test_a_forward_that_somebody_has_replaced_is_left_alone() -> None:
    net = make(Stack)
    mine = net.blocks[1].forward
    net.blocks[1].forward = mine
    items = hidden(2)
    expected = serially(net, items)
    with streamed(net):
        assert net.blocks[1].forward is mine
        with penstock.sweep(net) as sweep:
            assert same(sweep.map(net, items), expected)
        (said,) = penstock.statistics(net).fallbacks
        assert said.startswith("blocks.1 is not compiled")
    assert replaced(net) == [net.blocks[1]]


def test_a_forward_wrapped_meanwhile_runs_eagerly_afterwards(graphs: Graphs) -> None:
    net = make(Stack)
    items = hidden(1)
    expected = serially(net, items)
    with streamed(net):
        inner = net.blocks[0].forward
        net.blocks[0].forward = lambda x: inner(x)
    assert replaced(net) == [net.blocks[0]]
    assert same(serially(net, items), expected)
    assert graphs == []


@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_unwrapping_restores_every_forward_in_any_state(num_steps: int) -> None:
    net = make(Stack)
    items = hidden(4)
    expected = serially(net, items)

    def steps(number: int) -> list[torch.Tensor]:
        return [net(x) for x in items[:number]]

    penstock.wrap(net, Policy(device_memory="24KiB", resident_below=1, compile=True))
    assert replaced(net) == list(net.blocks)
    run = penstock.sweep(net).run(steps, [1, 2, 3, 4])
    for _ in range(num_steps):
        next(run)
    penstock.unwrap(net)
    assert replaced(net) == []
    assert same(serially(net, items), expected)


def test_the_error_of_a_block_ends_its_micro_batch_only() -> None:
    net = make(Stack)
    items = hidden(3)
    expected = serially(net, items)
    with streamed(net):
        with penstock.sweep(net) as sweep:
            found = sweep.map(net, [items[0], items[1][:, 1:]], return_exceptions=True)
            assert same(found[0], expected[0])
            assert isinstance(found[1], RuntimeError)
        assert open_sites(net) == []
        assert_usable_hidden(net, items, expected)


# What cannot be compiled.


def test_a_compiler_that_fails_is_announced_once_and_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []

    def compile_graph(graph: Any, inputs: Any) -> Any:
        tried.append(graph)
        raise RuntimeError("no C++ compiler\nfound anywhere")

    monkeypatch.setattr(compilation, "compile_graph", compile_graph)
    net = make(Stack)
    items = hidden(3)
    expected = serially(net, items)
    with streamed(net), caplog.at_level(logging.WARNING, "penstock"):
        for _ in range(2):
            with penstock.sweep(net) as sweep:
                assert same(sweep.map(net, items), expected)
        (said,) = penstock.statistics(net).fallbacks
    assert said == (
        "Block is not compiled and runs eagerly: RuntimeError: no C++ compiler"
    )
    assert [record.message for record in caplog.records] == [said]
    assert len(tried) == 1


class Unsupported(Block):
    """A block that dynamo cannot trace, and that counts its calls."""

    num_calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        with contextlib.suppress(KeyError):
            type(self).num_calls += 1
            iter([x.sum().item()].__iter__, None)
            raise KeyError
        return super().forward(x)


def test_what_dynamo_cannot_trace_runs_once_as_it_is() -> None:
    net = make(Stack, Unsupported)
    items = hidden(3)
    expected = serially(net, items)
    Unsupported.num_calls = 0
    with streamed(net), penstock.sweep(net) as sweep:
        assert same(sweep.map(net, items), expected)
    assert Unsupported.num_calls == len(items) * len(net.blocks)


class Kept(Block):
    @dynamo.disable  # type: ignore[untyped-decorator]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def test_a_forward_that_is_kept_from_dynamo_is_announced(graphs: Graphs) -> None:
    net = make(Stack, Kept)
    items = hidden(3)
    expected = serially(net, items)
    with streamed(net), penstock.sweep(net) as sweep:
        assert same(sweep.map(net, items), expected)
        (said,) = penstock.statistics(net).fallbacks
    assert said.startswith("Kept is not compiled and runs eagerly: ")
    assert graphs == []


class Numbered(Block):
    """Each one is another graph, for its number is a constant of it."""

    numbers: Iterator[int] = iter(range(10**6))

    def __init__(self) -> None:
        super().__init__()
        self.number = next(self.numbers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1 + self.number)


def test_blocks_that_differ_too_much_are_announced(graphs: Graphs) -> None:
    limit = dynamo.config.recompile_limit
    net = make(Stack, Numbered, limit + 2)
    items = hidden(2)
    expected = serially(net, items)
    with streamed(net), penstock.sweep(net) as sweep:
        assert same(sweep.map(net, items), expected)
        (said,) = penstock.statistics(net).fallbacks
    assert said.startswith("Numbered runs eagerly in part or for some calls: ")
    assert len(graphs) == limit


def test_calls_that_record_gradients_run_eagerly_and_say_so(graphs: Graphs) -> None:
    net = make(Stack)
    items = hidden(2)
    x = batches(1)[0]
    expected = net(x)
    with streamed(net):
        assert torch.equal(net(x), expected)
        (said,) = penstock.statistics(net).fallbacks
        assert "where gradients are recorded" in said
        assert graphs == []
        with penstock.sweep(net) as sweep:
            sweep.map(net, items)
    assert len(graphs) == 1


# Bits.


def why_no_compiler() -> str | None:
    """Why inductor cannot compile for this CPU; None where it can."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "no C++ compiler that works (apt install g++, or set CXX)"
    return None


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_results_of_torchs_own_compilers(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """aot_eager runs the same kernels, so it is exact; inductor fuses, so that the last
    bits may differ."""
    if backend == "inductor" and (reason := why_no_compiler()):
        pytest.skip(reason)
    num = []

    def compile_graph(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        num.append(graph)
        if backend == "inductor":
            return torchs_compiler(graph, inputs)
        return dynamo.lookup_backend(backend)(graph, inputs)

    monkeypatch.setattr(compilation, "compile_graph", compile_graph)
    net = make(Stack)
    items = hidden(4)
    expected = serially(net, items)
    with streamed(net, slots=4), penstock.sweep(net) as sweep:
        for _ in range(2):
            found = sweep.map(net, items)
            if backend == "aot_eager":
                assert same(found, expected)
            torch.testing.assert_close(found, expected)
        assert penstock.statistics(net).fallbacks == ()
    assert len(num) == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_without_a_compiler_blocks_run_eagerly_and_say_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compilation, "compile_graph", torchs_compiler)
    net = make(Stack)
    items = hidden(4)
    expected = serially(net, items)
    nothing = {"cpp.cxx": (None, "/nonexistent/c++"), "force_disable_caches": True}
    with inductor.config.patch(nothing), streamed(net, slots=4):
        for _ in range(2):
            with penstock.sweep(net) as sweep:
                assert same(sweep.map(net, items), expected)
        said = penstock.statistics(net).fallbacks[0]  # what dynamo counted may follow
    assert said.startswith("Block is not compiled and runs eagerly: ")
    assert "compiler" in said.lower()


def assert_usable_hidden(
    net: Any, items: list[torch.Tensor], expected: list[torch.Tensor]
) -> None:
    with torch.inference_mode():
        assert same([net(x) for x in items], expected)
    assert open_sites(net) == []
