"""Puts a streamed model together. The only file that names concrete tiers."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from ..io import aio
from ..io.aio import LibaioReader
from ..io.arena import Arena
from ..io.buffered import AiofilesReader
from ..io.checkpoint import Checkpoint
from ..io.choice import Remembered, choose
from ..io.files import ALIGNMENT
from ..io.header import FileStamp
from ..io.host import HostTier
from ..io.layout import Layout
from ..io.loader import Loader
from ..io.reader import Reader
from ..io.recipe import Recipe
from ..io.threads import ThreadReader
from ..scheduler.doors import Doors, Site
from ..scheduler.gate import Gate
from ..scheduler.order import Order
from ..scheduler.placement import spread
from ..scheduler.working_set import WorkingSet
from .binding import Binding
from .division import capacity_of, check_least, check_overlap, divide
from .engine import Engine
from .memory import HeapTrimmer
from .poison import StreamedParameter
from .policy import IO, Policy, cache_folder
from .progress import FillProgress
from .rows import RowGatherer
from .sites import Found, Place


def build(
    model: nn.Module,
    checkpoint: Checkpoint,
    recipes: Mapping[str, Recipe],
    policy: Policy,
) -> Engine:
    """Streams the tensors of `recipes` (by their names in `model`) from `checkpoint`.

    Raises DoesNotFitError, saying the least that works, when device_memory is too
    small. Nothing is left open when it raises.
    """
    places, recipes = _places(model, recipes)
    nbytes = {name: recipe.nbytes for name, recipe in recipes.items()}
    gathered = _gathered(model, places, recipes, policy.gather_rows)
    alignment = ALIGNMENT
    capacity = capacity_of(policy, nbytes, alignment=alignment)
    divided = partial(
        divide, model, places, recipes, nbytes, gathered, policy, alignment
    )
    found, layouts = divided(capacity)
    check_least(divided, capacity)
    in_host = _in_host(found, layouts, policy)
    fallbacks = check_overlap(found, layouts, capacity)
    tiers = _open(checkpoint, layouts, in_host, capacity, policy)
    gatherers = {
        name: RowGatherer(
            recipes[name],
            tiers.reader,
            buffer_bytes=policy.io.bounce,
            max_gap_bytes=tiers.reader.alignment,
        )
        for name in gathered
    }
    stand_ins: dict[str, torch.Tensor] = {}
    binding = Binding(found, layouts, places, stand_ins, tiers.arena, tiers.host)
    working_set = _working_set(found, layouts, in_host, capacity, tiers.loader)
    doors = _doors(found, working_set, binding)
    engine = Engine(
        model,
        policy,
        found,
        recipes=recipes,
        arena=tiers.arena,
        reader=tiers.reader,
        loader=tiers.loader,
        host=tiers.host,
        working_set=working_set,
        binding=binding,
        doors=doors,
        gate=Gate(doors, Order(len(found.sites)), lookahead=policy.lookahead),
        gatherers=tuple(gatherers.values()),
        fallbacks=(*fallbacks, *tiers.fallbacks),
    )
    for name, recipe in recipes.items():
        gatherer = gatherers.get(name)
        stand_ins[name] = StreamedParameter(
            name,
            recipe.shape,
            recipe.dtype,
            torch.device(policy.device),
            touch=partial(engine.touch, name),
            gather=gatherer.gather if gatherer is not None else None,
            requires_grad=_requires_grad(places[name][0]),
        )
    try:
        binding.poison_all()
        engine.start()
    except BaseException:
        engine.close()
        raise
    return engine


@dataclass(frozen=True, slots=True)
class _Tiers:
    arena: Arena
    reader: Reader
    loader: Loader
    host: HostTier | None
    fallbacks: tuple[str, ...]


def _in_host(found: Found, layouts: list[Layout], policy: Policy) -> tuple[int, ...]:
    """The units that stay in host memory."""
    streamed = [
        index
        for index, unit in enumerate(found.units)
        if unit.sites and not unit.is_resident
    ]
    sizes = [layouts[unit].nbytes for unit in streamed]
    return tuple(streamed[i] for i in spread(sizes, policy.host_memory or 0))


def _open(
    checkpoint: Checkpoint,
    layouts: list[Layout],
    in_host: tuple[int, ...],
    capacity: int,
    policy: Policy,
) -> _Tiers:
    with ExitStack() as opened:
        arena = opened.enter_context(Arena(capacity))
        reader, fallbacks = open_reader(checkpoint.stamps, policy.io)
        opened.enter_context(reader)
        host = None
        if in_host:
            progress = FillProgress("reading into host memory")
            with progress:
                host = HostTier(
                    layouts,
                    in_host,
                    reader,
                    checkpoint.stamps,
                    bounce_bytes=policy.io.bounce,
                    shared=policy.host_shared,
                    version=f"{version('penstock')} {version('transformers')}",
                    progress=progress,
                )
        loader = Loader(layouts, arena, reader, bounce_bytes=policy.io.bounce)
        opened.pop_all()  # from here on the engine closes them
        return _Tiers(arena, reader, loader, host, fallbacks)


def open_reader(
    stamps: Mapping[Path, FileStamp], io: IO
) -> tuple[Reader, tuple[str, ...]]:
    """The reader that `io` asks for or, where it cannot be had, the best that can, and
    what was said of that."""
    sizes = {"chunk_bytes": io.chunk}
    makers: dict[str, Callable[[], Reader]] = {
        "libaio": partial(
            LibaioReader, stamps, depth=io.depth, direct=io.direct, **sizes
        ),
        "threads": partial(
            ThreadReader, stamps, num_threads=io.threads, direct=io.direct, **sizes
        ),
        "aiofiles": partial(AiofilesReader, stamps, num_tasks=io.threads, **sizes),
    }
    missing = {"gds": "it reads into the memory of a GPU, and the device is the CPU"}
    if (reason := aio.why_not()) is not None:
        missing["libaio"] = reason
    name, fallbacks = choose(
        io.reader,
        makers,
        missing,
        stamps,
        direct=io.direct,
        settings=f"threads {io.threads}, depth {io.depth}, chunk {io.chunk}",
        remembered=Remembered(cache_folder(io) / "readers.json"),
    )
    return makers[name](), fallbacks


def _working_set(
    found: Found,
    layouts: list[Layout],
    in_host: tuple[int, ...],
    capacity: int,
    loader: Loader,
) -> WorkingSet:
    return WorkingSet(
        [plan.nbytes for plan in layouts],
        names=[unit.name for unit in found.units],
        capacity=capacity,
        load=loader.load,
        needed=frozenset(
            index
            for index, unit in enumerate(found.units)
            if (unit.sites or unit.is_resident) and index not in in_host
        ),
    )


def _doors(found: Found, working_set: WorkingSet, binding: Binding) -> Doors:
    trim = HeapTrimmer()

    def bind(site: int, offsets: tuple[int, ...]) -> None:
        trim()  # the site before this one has freed its activations
        binding.bind(site, offsets)

    sites = [
        Site(site.name, binding.units_of_site(index))
        for index, site in enumerate(found.sites)
    ]
    return Doors(sites, working_set, bind=bind, unbind=binding.unbind)


def _places(
    model: nn.Module, recipes: Mapping[str, Recipe]
) -> tuple[dict[str, list[Place]], dict[str, Recipe]]:
    """Where each distinct tensor is used, under the one name that has a recipe."""
    by_tensor: dict[int, str] = {}
    places: dict[str, list[Place]] = {}
    for module_name, module in model.named_modules():
        for store, is_buffer in ((module._parameters, False), (module._buffers, True)):
            for key, tensor in store.items():
                if tensor is None:
                    continue
                name = f"{module_name}.{key}" if module_name else key
                if name in recipes:
                    by_tensor.setdefault(id(tensor), name)
                places.setdefault(str(id(tensor)), []).append(
                    Place(module, key, is_buffer)
                )
    named = {
        by_tensor[int(tensor)]: where
        for tensor, where in places.items()
        if int(tensor) in by_tensor
    }
    return named, {name: recipes[name] for name in named}


def _requires_grad(place: Place) -> bool:
    parameter = place.module._parameters.get(place.key)
    return parameter is not None and parameter.requires_grad


def _gathered(
    model: nn.Module,
    places: Mapping[str, list[Place]],
    recipes: Mapping[str, Recipe],
    min_bytes: int,
) -> frozenset[str]:
    """Tables that are large enough, lie in one byte range, and are an embedding's."""
    return frozenset(
        name
        for name, recipe in recipes.items()
        if recipe.nbytes >= min_bytes
        and recipe.stored_rows is not None
        and len(recipe.shape) == 2
        and any(isinstance(place.module, nn.Embedding) for place in places[name])
    )
