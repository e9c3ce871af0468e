"""Streams blocks with Penstock's own link, working set, sites and binding, but without
a checkpoint: the weights are in pinned host memory from the start.

What is left out is what `penstock.load` puts around them: reading files, hooks, the
sweep's switching. It needs torch and transformers, nothing else.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from gpu.common import Part
from gpu.shapes import Shape, fill, first_of, position
from penstock.io.devices.device import Device
from penstock.io.devices.opening import open_device
from penstock.io.event import Event
from penstock.io.extent import align_up
from penstock.io.memory.arena import Arena, Memory
from penstock.io.memory.pinned import Pinned, registrar_of
from penstock.io.weights.layout import Layout, Placed
from penstock.io.weights.link import Link
from penstock.io.weights.source import ResidentSource
from penstock.io.weights.steps import LoadSteps
from penstock.io.weights.transfer import packed
from penstock.offload.units.sites import FoundSite, FoundUnit, ModelDivision
from penstock.offload.units.subtrees import ParameterRef
from penstock.offload.weights.binding import Binding
from penstock.scheduler.slots.open_sites import OpenSites, Site
from penstock.scheduler.slots.working_set import WorkingSet

_ALIGNMENT = 512
_PIECE_BYTES = 2 << 20
LOOKAHEAD = 2


@dataclass
class Rig:
    """Runs blocks in a cycle, with a few of them on the device at one time."""

    device: Device
    layers: list[nn.Module]
    layouts: list[Layout]
    unit_bytes: int
    host: Arena
    link: Link
    working_set: WorkingSet
    open_sites: OpenSites
    memory: Memory
    position: tuple[torch.Tensor, torch.Tensor]
    fallback: str | None
    """Why a part of the host memory is not pinned; None if all of it is."""

    def stream(self) -> None:
        """Runs one pass without computing: every unit is loaded and released."""
        for site in range(len(self.layers)):
            self.working_set.acquire(site)
            self._look_ahead(site)
            self.working_set.release(site)

    def run(self, micro_batches: list[torch.Tensor]) -> list[torch.Tensor]:
        """Runs all micro-batches through all blocks, block by block.

        The tensors, of `micro_batches` and in the result, are hidden states, bfloat16
        [rows, length, hidden].
        """
        states = list(micro_batches)
        for site, layer in enumerate(self.layers):
            self.open_sites.enter(site)
            self._look_ahead(site)
            states = [self._through(layer, state) for state in states]
            self.open_sites.leave(site)
        return states

    def stay(self, micro_batches: list[torch.Tensor]) -> list[torch.Tensor]:
        """Does the same work as `run` with the weights of one block, which stay on the
        device, for all blocks."""
        states = list(micro_batches)
        self.open_sites.enter(0)
        for _ in self.layers:
            states = [self._through(self.layers[0], state) for state in states]
        self.open_sites.leave(0)
        return states

    def plain(self, target: torch.Tensor) -> None:
        """Copies all units to `target` in a simple loop: the ceiling of `stream`."""
        stream = self.device.stream()
        for index in range(len(self.layers)):
            stream.copy(target, self.host.tensor(self._start(index), self.unit_bytes))

    def reference(self, micro_batches: list[torch.Tensor]) -> list[torch.Tensor]:
        """The correct result of `run`, from weights that are copied to the device
        first."""
        states = list(micro_batches)
        layer = copy.deepcopy(self.layers[0]).to_empty(device=states[0].device)
        parameters = dict(layer.named_parameters())
        for index, plan in enumerate(self.layouts):
            for placed, parameter in zip(
                plan.tensors, parameters.values(), strict=True
            ):
                start = self._start(index) + placed.offset
                stored = self.host.tensor(start, parameter.nbytes)
                parameter.copy_(stored.view(placed.dtype).view(placed.shape))
            states = [self._through(layer, state) for state in states]
        return states

    def _start(self, unit: int) -> int:
        return unit * align_up(self.unit_bytes, _PIECE_BYTES)

    def _look_ahead(self, site: int) -> None:
        num = len(self.layers)
        ahead = [(site + 1 + n) % num for n in range(LOOKAHEAD)]
        self.open_sites.prefetch_sites([other for other in ahead if other != site])

    def _through(self, layer: nn.Module, state: torch.Tensor) -> torch.Tensor:
        return first_of(layer(state, position_embeddings=self.position))


@contextmanager
def open_rig(
    part: Part, shape: Shape, num_layers: int, num_slots: int
) -> Iterator[Rig]:
    """A rig with `num_layers` blocks of random weights, and a working set of
    `num_slots`."""
    config = shape.config(num_layers)
    with torch.device("meta"):
        blocks = [LlamaDecoderLayer(config, i) for i in range(num_layers)]
    layers: list[nn.Module] = [block.bfloat16().eval() for block in blocks]
    layouts = [_layout(f"layers.{i}", layer) for i, layer in enumerate(layers)]
    transfers = [
        packed(plan, alignment=_ALIGNMENT, max_gap_bytes=0) for plan in layouts
    ]
    unit_bytes = transfers[0].nbytes
    stride = align_up(unit_bytes, _PIECE_BYTES)
    device = open_device(str(part.device))
    with ExitStack() as stack:
        host = stack.enter_context(Arena(stride * num_layers))
        fallback = None
        if part.has_gpu:  # registered unit by unit, so that no copy crosses a border
            fallback = stack.enter_context(
                Pinned(
                    host.view(0, host.nbytes),
                    max_bytes=host.nbytes,
                    chunk_bytes=stride,
                    registrar=registrar_of(part.module),
                )
            ).fallback
        for index in range(num_layers):
            fill(host.tensor(index * stride, unit_bytes), 0.02, part.device)
        part.synchronize()
        memory = device.allocate(num_slots * unit_bytes)
        stack.callback(memory.close)
        source = ResidentSource(host, {i: i * stride for i in range(num_layers)})
        link = stack.enter_context(
            Link("host", source, dict(enumerate(transfers)), memory, device, pace=None)
        )
        working_set = WorkingSet(
            [unit_bytes] * num_layers,
            names=[plan.name for plan in layouts],
            capacity=memory.nbytes,
            load=link.load,
            mark=_mark(device),
            needed=frozenset(range(num_layers)),
        )
        found, places, placeholders = _found(layers)
        binding = Binding(found, transfers, places, placeholders, memory, None)
        open_sites = OpenSites(
            [Site(site.name, (i,)) for i, site in enumerate(found.sites)],
            working_set,
            bind=binding.bind,
            unbind=binding.unbind,
        )
        stack.callback(device.synchronize)
        stack.callback(working_set.close)
        yield Rig(
            device,
            layers,
            layouts,
            unit_bytes,
            host,
            link,
            working_set,
            open_sites,
            memory,
            position(part, shape, num_layers),
            fallback,
        )


def hidden_states(part: Part, shape: Shape, num: int) -> list[torch.Tensor]:
    return [
        torch.randn(
            shape.rows,
            shape.row_tokens,
            shape.hidden,
            dtype=torch.bfloat16,
            device=part.device,
        )
        for _ in range(num)
    ]


def _mark(device: Device) -> Callable[[], Event | None]:
    return (lambda: None) if device.is_host else (lambda: device.compute.record())


def _layout(name: str, layer: nn.Module) -> Layout:
    """The layout of the block's parameters, one after the other as in a file."""
    placed, end = [], 0
    for key, parameter in layer.named_parameters():
        full_name = f"{name}.{key}"
        placed.append(Placed(full_name, end, parameter.dtype, tuple(parameter.shape)))
        end += parameter.nbytes
    return Layout.of(name, end, LoadSteps(), tuple(placed), end)


def _found(
    layers: list[nn.Module],
) -> tuple[ModelDivision, dict[str, list[ParameterRef]], dict[str, torch.Tensor]]:
    sites, units = [], []
    places: dict[str, list[ParameterRef]] = {}
    placeholders: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(layers):
        name = f"layers.{index}"
        names = []
        for key, parameter in layer.named_parameters():
            owner, _, attribute = key.rpartition(".")
            full_name = f"{name}.{key}"
            names.append(full_name)
            places[full_name] = [ParameterRef(layer.get_submodule(owner), attribute)]
            placeholders[full_name] = parameter
        sites.append(FoundSite(name, layer))
        units.append(FoundUnit(name, tuple(names), (index,), False))
    return ModelDivision(tuple(sites), tuple(units)), places, placeholders
