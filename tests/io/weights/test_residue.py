"""Streamed weights lie, modulo 64 bytes, where those of the resident model lie: on some
CPUs the last bits of a product depend on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_architectures import load_tight, outputs_of
from torch import nn

import penstock
import zoo
from checkpoints import SAVED_DTYPES, random_tensor, same_bits, shift_tensors
from penstock import Policy
from penstock.io.checkpoint.index import open_files
from penstock.io.weights.residue import clone_at, clone_like, joined_like, residue_of
from penstock.io.weights.tensor_file import FILLER, write_tensors
from penstock.offload.weights.placeholder import StreamedParameter

pytestmark = pytest.mark.usefixtures("no_leaks")

CHECKED = ("llama", "gpt2", "mixtral", "qwen3_next", "granitemoeshared", "t5", "bert")
"""Weights as stored, transposed, stacked, split, tied."""

FLOAT32_ONLY = {"xlnet", "deberta", "fnet"}
"""Resident, too: their code mixes dtypes, or transforms what bfloat16 cannot."""
LEAST_TOKENS = {"funnel": 9}
"""It pools tokens. Others run with one, where every product has one row."""
ROOMIER = {"resnet"}
"""Many small weights, each in pages of its own."""


@pytest.mark.parametrize("residue", [0, 2, 8, 40, 62])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
def test_a_clone_is_where_it_is_wanted(dtype: torch.dtype, residue: int) -> None:
    tensor = random_tensor(dtype, (3, 5))
    clone = clone_at(tensor.t(), residue)
    assert residue_of(clone) == residue
    assert clone.is_contiguous()
    assert same_bits(clone, tensor.t())
    assert residue_of(clone_like(clone)) == residue


@pytest.mark.parametrize("requires_grad", [False, True])
def test_copies_of_weights_compute_the_same_bits(requires_grad: bool) -> None:
    """torch's `matmul` folds dimensions differently for what requires a gradient."""
    weight = clone_at(torch.randn(96, 3), 8).requires_grad_(requires_grad)
    whole = joined_like([clone_like(weight[:40].detach()), weight[40:].detach()])
    assert residue_of(whole) == residue_of(weight)
    for copy in (clone_like(weight), whole.requires_grad_(requires_grad)):
        with torch.inference_mode():
            states = torch.randn(2, 9, 3).transpose(1, 2)
            assert torch.equal(copy @ states, weight @ states)
        assert copy.requires_grad == requires_grad


def test_a_file_has_every_tensor_where_it_is_wanted(tmp_path: Path) -> None:
    shapes = [(), (3,), (0, 4), (7, 5)]
    tensors = {
        f"{name}.{number}": random_tensor(dtype, shape, seed=number)
        for name, dtype in SAVED_DTYPES.items()
        for number, shape in enumerate(shapes)
    }
    residues = {name: 8 * index % 64 for index, name in enumerate(tensors)}
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors, residues)
    entries = open_files(tmp_path, [path.name]).entries
    for name, tensor in load_file(path).items():
        if not name.startswith(FILLER):
            assert entries[name].offset % 64 == residues[name]
            assert same_bits(tensor, tensors[name])
    assert set(tensors) <= set(entries)


def test_a_dtype_that_the_format_lacks_is_named(tmp_path: Path) -> None:
    tensor = torch.zeros(2, dtype=torch.complex128)
    with pytest.raises(ValueError, match=r"complex128.*'it'"):
        write_tensors(tmp_path / "x", {"it": tensor}, {"it": 0})


@contextmanager
def lying(model: nn.Module) -> Iterator[dict[str, int]]:
    """The residue of every matrix that is there when its module runs, by name."""
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, int] = {}

    def note(module: nn.Module, args: Any) -> None:
        for key, parameter in module._parameters.items():
            if parameter is None or isinstance(parameter, StreamedParameter):
                continue
            if parameter.dim() > 1:
                found[f"{names[id(module)]}.{key}"] = residue_of(parameter)

    hooks = [module.register_forward_pre_hook(note) for module in model.modules()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def inputs(name: str, dtype: torch.dtype, tokens: int) -> dict[str, torch.Tensor]:
    """A row: of one token, where products are of one row, or of more."""
    batch = zoo.inputs(name, rows=1, tokens=tokens)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def load_small(name: str, path: Path) -> Any:
    if name in ROOMIER:
        return penstock.load(path, Policy(device_memory="512KiB", resident_below=256))
    return load_tight(name, path)


def check_lies_like_from_pretrained(name: str, dtype: torch.dtype, path: Path) -> None:
    zoo.save_checkpoint(name, path, dtype)
    shift_tensors(path, 8)
    resident = zoo.load(name, path, dtype=dtype)
    batches = [inputs(name, dtype, n) for n in (LEAST_TOKENS.get(name, 1), 9)]
    with torch.inference_mode(), lying(resident) as wanted:
        expected = [outputs_of(resident, batch) for batch in batches]
    with (
        load_small(name, path) as model,
        torch.inference_mode(),
        lying(model) as found,
    ):
        streamed = [outputs_of(model, batch) for batch in batches]
    assert all(map(torch.equal, streamed, expected)), "other bits"
    assert found
    assert found == {name: wanted[name] for name in found}


@pytest.mark.kinds
@pytest.mark.parametrize("name", CHECKED)
def test_weights_lie_like_those_of_from_pretrained(name: str, tmp_path: Path) -> None:
    check_lies_like_from_pretrained(name, torch.float32, tmp_path)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name, architecture in zoo.ARCHITECTURES.items()
        for dtype in (torch.float32, torch.bfloat16)
        if not architecture.mutates
        and not (dtype is torch.bfloat16 and name in FLOAT32_ONLY)
    ],
)
def test_all_weights_lie_like_those_of_from_pretrained(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    check_lies_like_from_pretrained(name, dtype, tmp_path)


@pytest.mark.parametrize("residue", [0, 8])
def test_a_wrapped_module_has_its_weights_where_they_were(
    residue: int, tmp_path: Path
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Linear(64, 64, bias=odd) for odd in (True, False)))
        net.append(nn.Linear(64, 3))
    for parameter in net.parameters():
        parameter.data = clone_at(parameter.data, residue)
    row = torch.randn(1, 64)
    with torch.inference_mode():
        with lying(net) as wanted:
            expected = net(row)
        penstock.wrap(net, Policy(device_memory="64KiB", io={"cache": tmp_path}))
        with lying(net) as found:
            streamed = net(row)
        copied = penstock.statistics(net).bytes_copied
        penstock.unwrap(net)
        assert torch.equal(streamed, expected)
        assert torch.equal(net(row), expected)
    assert found == wanted
    assert copied == 0
    assert {residue_of(parameter) for parameter in net.parameters()} == {residue}
