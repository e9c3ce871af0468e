"""Random checkpoints and recipes of every kind, and what must come of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file

from checkpoints import (
    SAVED_DTYPES,
    bits_of,
    entry,
    random_floats,
    random_tensor,
    write_raw,
)
from penstock.io.checkpoint.index import Checkpoint, open_files
from penstock.io.weights.recipe import Recipe, TensorSlice, View, computed, plain

Kind = Literal[
    "plain",  # the stored tensor itself
    "stack",  # contiguous slices of the parameter, one for each stored tensor
    "columns",  # strided parts of the parameter
    "turned_stack",  # each stored tensor transposed into its slice
    "rows_of",  # a contiguous part of the stored tensor
    "columns_of",  # a strided part of the stored tensor
    "turned",  # the transposed stored tensor
    "convert",  # a function of whole stored tensors
]
KINDS: tuple[Kind, ...] = (
    "plain",
    "stack",
    "columns",
    "turned_stack",
    "rows_of",
    "columns_of",
    "turned",
    "convert",
)
_CASTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NAMES = {dtype: name for name, dtype in SAVED_DTYPES.items()}


@dataclass(frozen=True)
class Parameter:
    """A parameter to be made: `parts` stored tensors of [rows, columns]."""

    kind: Kind
    rows: int
    columns: int
    parts: int
    stored: torch.dtype
    dtype: torch.dtype


@dataclass(frozen=True)
class Example:
    """What is stored, in which order and in which of three files."""

    parameters: tuple[Parameter, ...]
    foreign_bytes: tuple[int, ...]
    order: int
    num_files: int


@dataclass(frozen=True)
class Made:
    """An example on disk: its recipes, and the parameters that they must give."""

    checkpoint: Checkpoint
    recipes: tuple[Recipe, ...]
    wanted: Mapping[str, torch.Tensor]


def _dtypes(kind: Kind) -> st.SearchStrategy[tuple[torch.dtype, torch.dtype]]:
    same = st.sampled_from(list(SAVED_DTYPES.values())).map(lambda d: (d, d))
    if kind == "convert":
        same = st.sampled_from(_CASTS).map(lambda d: (d, d))
    return same | st.tuples(st.sampled_from(_CASTS), st.sampled_from(_CASTS))


def parameters(max_side: int = 70) -> st.SearchStrategy[Parameter]:
    side = st.sampled_from([0, 1, 2, 3, 5, 8, 16, 64]) | st.integers(1, max_side)

    def with_dtypes(kind: Kind) -> st.SearchStrategy[Parameter]:
        parts = st.integers(1, 3) if kind in _OF_SEVERAL else st.just(1)
        return st.builds(
            lambda rows, columns, parts, dtypes: Parameter(
                kind, rows, columns, parts, *dtypes
            ),
            side,
            side,
            parts,
            _dtypes(kind),
        )

    return st.sampled_from(KINDS).flatmap(with_dtypes)


_OF_SEVERAL = ("stack", "columns", "turned_stack", "convert")


def examples(max_side: int = 70) -> st.SearchStrategy[Example]:
    return st.builds(
        Example,
        st.lists(parameters(max_side), min_size=1, max_size=5).map(tuple),
        st.lists(st.sampled_from([1, 3, 100, 5000]), max_size=3).map(tuple),
        st.integers(0, 999),
        st.integers(1, 3),
    )


def make(example: Example, folder: Path) -> Made:
    """Writes the example's files to `folder`. Tensors lie in random order, at odd
    offsets, between tensors that nobody asks for."""
    stored: dict[str, torch.Tensor] = {
        f"foreign.{index}": random_tensor(torch.uint8, (nbytes,), seed=index)
        for index, nbytes in enumerate(example.foreign_bytes)
    }
    for index, parameter in enumerate(example.parameters):
        is_cast = parameter.stored != parameter.dtype or parameter.kind == "convert"
        fill = random_floats if is_cast else random_tensor
        for part in range(parameter.parts):
            stored[f"{index}.{part}"] = fill(
                parameter.stored,
                (parameter.rows, parameter.columns),
                seed=100 * index + part,
            )
    generator = torch.Generator().manual_seed(example.order)
    names = list(stored)
    shuffled = torch.randperm(len(names), generator=generator).tolist()
    files: list[dict[str, torch.Tensor]] = [{} for _ in range(example.num_files)]
    for position, index in enumerate(shuffled):
        files[position % len(files)][names[index]] = stored[names[index]]
    file_names = [f"{index}.safetensors" for index in range(len(files))]
    for name, tensors in zip(file_names, files, strict=True):
        write_packed(folder / name, tensors)
    checkpoint = open_files(folder, file_names)
    loaded: dict[str, torch.Tensor] = {}
    for name in file_names:
        loaded |= load_file(folder / name)
    made = [
        _recipe(f"parameter.{index}", parameter, index, checkpoint, loaded)
        for index, parameter in enumerate(example.parameters)
    ]
    return Made(
        checkpoint,
        tuple(recipe for recipe, _ in made),
        {recipe.name: wanted for recipe, wanted in made},
    )


def write_packed(
    path: Path, tensors: Mapping[str, torch.Tensor], *, data_start: int | None = None
) -> Path:
    """Writes tensors in the given order and without any padding, as old writers did;
    the first of them stands at `data_start` where that is given."""
    header, data, position = {}, b"", 0
    for name, tensor in tensors.items():
        content = bits_of(tensor).numpy().tobytes()
        end = position + len(content)
        header[name] = entry(_NAMES[tensor.dtype], list(tensor.shape), position, end)
        data, position = data + content, end
    text = json.dumps(header).encode()
    if data_start is not None:
        text = text.ljust(data_start - 8)
    return write_raw(path, text, data=data)


def _recipe(
    name: str,
    parameter: Parameter,
    index: int,
    checkpoint: Checkpoint,
    loaded: Mapping[str, torch.Tensor],
) -> tuple[Recipe, torch.Tensor]:
    """The recipe, and independently of it the parameter, by torch's own views."""
    names = [f"{index}.{part}" for part in range(parameter.parts)]
    entries = tuple(checkpoint.entries[n] for n in names)
    tensors = [loaded[n] for n in names]
    if parameter.kind == "plain":
        recipe = plain(entries[0], name=name, dtype=parameter.dtype)
        return recipe, tensors[0].to(parameter.dtype)
    if parameter.kind == "convert":
        wanted = convert({n: t for n, t in zip(names, tensors, strict=True)})
        shape = tuple(wanted.shape)
        recipe = computed(name, shape, parameter.dtype, convert, entries)
        return recipe, wanted.to(parameter.dtype)
    shape = _shape(parameter)
    whole = torch.empty(shape, dtype=parameter.dtype, device="meta")
    wanted = torch.zeros(shape, dtype=torch.uint8).to(parameter.dtype)
    pieces = []
    for part, tensor in enumerate(tensors):
        source = _source(parameter, tensor)
        _target(parameter, wanted, part).copy_(source)
        stored = torch.empty_like(tensor, device="meta")
        pieces.append(
            TensorSlice(
                entries[part],
                View.of(_source(parameter, stored)),
                View.of(_target(parameter, whole, part)),
            )
        )
    return Recipe(name, shape, parameter.dtype, tuple(pieces)), wanted


def convert(stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """No view of anything: every second column, summed by pairs of rows."""
    whole = torch.cat([tensor[:, ::2] for tensor in stored.values()], dim=1)
    return whole[::2] + whole.flip(0)[::2]


def _shape(parameter: Parameter) -> tuple[int, ...]:
    rows, columns, parts = parameter.rows, parameter.columns, parameter.parts
    match parameter.kind:
        case "stack":
            return (parts, rows, columns)
        case "columns":
            return (rows, parts * columns)
        case "turned_stack":
            return (parts, columns, rows)
        case "rows_of":
            return (rows - rows // 3, columns)
        case "columns_of":
            return (rows, columns - columns // 3)
        case _:
            return (columns, rows)


def _source(parameter: Parameter, tensor: torch.Tensor) -> torch.Tensor:
    match parameter.kind:
        case "rows_of":
            return tensor[parameter.rows // 3 :]
        case "columns_of":
            return tensor[:, parameter.columns // 3 :]
        case "turned":
            return tensor.t()
        case _:
            return tensor


def _target(parameter: Parameter, whole: torch.Tensor, part: int) -> torch.Tensor:
    match parameter.kind:
        case "stack":
            return whole[part]
        case "columns":
            return whole.narrow(1, part * parameter.columns, parameter.columns)
        case "turned_stack":
            return whole[part].t()
        case _:
            return whole
