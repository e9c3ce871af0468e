"""Writes a checkpoint of a published size that takes no room: real headers, and holes
in place of the weights, which read as zeros.

Tensors have the names and shapes of published files: experts one by one, and block
scales if the config has a `quantization_config` of FP8.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from penstock.offload.weights import hf

Tensor = tuple[str, tuple[int, ...], torch.dtype]
_DTYPES = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
}
_STAYS = ("embed_tokens", "lm_head", "norm", "mlp.gate.")
"""Parts of the names of weights that are not quantised."""
SHARD_BYTES = 4_300_000_000


def write(config: Path, out: Path) -> tuple[int, int, int]:
    """Writes the checkpoint that config.json in the folder `config` describes. Returns
    the numbers of its files, tensors and bytes."""
    values = json.loads((config / "config.json").read_text())
    block = values.pop("quantization_config", {}).get("weight_block_size")
    values.pop("auto_map", None)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values))
        recipes = hf.imagine(Path(folder), "bfloat16").recipes
    tensors = [
        each
        for name, recipe in recipes.items()
        for plain in _one_by_one(name, recipe.shape, recipe.dtype)
        for each in _quantised(plain, block)
    ]
    files: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        nbytes = _nbytes(tensor)
        if files[-1] and size + nbytes > SHARD_BYTES:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += nbytes
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(config / "config.json", out)
    weight_map: dict[str, str] = {}
    for index, file in enumerate(files, 1):
        name = f"model-{index:05d}-of-{len(files):05d}.safetensors"
        _write_file(out / name, sorted(file))  # as safetensors' own tools do
        weight_map.update((tensor, name) for tensor, _, _ in file)
    (out / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map})
    )
    return len(files), len(tensors), sum(map(_nbytes, tensors))


def _nbytes(tensor: Tensor) -> int:
    _, shape, dtype = tensor
    return math.prod(shape) * dtype.itemsize


def _one_by_one(
    name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Iterator[Tensor]:
    """The tensors of files that a tensor of the model is made of."""
    if name.endswith("experts.gate_up_proj"):
        prefix = name.removesuffix("gate_up_proj")
        for expert in range(shape[0]):
            half = (shape[1] // 2, shape[2])
            yield f"{prefix}{expert}.gate_proj.weight", half, dtype
            yield f"{prefix}{expert}.up_proj.weight", half, dtype
    elif name.endswith("experts.down_proj"):
        prefix = name.removesuffix("down_proj")
        for expert in range(shape[0]):
            yield f"{prefix}{expert}.down_proj.weight", shape[1:], dtype
    else:
        yield name, shape, dtype


def _quantised(tensor: Tensor, block: list[int] | None) -> Iterator[Tensor]:
    """A weight in FP8, and the scales of its blocks."""
    name, shape, _ = tensor
    is_left = len(shape) != 2 or any(part in name for part in _STAYS)
    if block is None or is_left:
        yield tensor
        return
    yield name, shape, torch.float8_e4m3fn
    scales = tuple(-(-size // each) for size, each in zip(shape, block, strict=True))
    yield f"{name}_scale_inv", scales, torch.float32


def _write_file(path: Path, tensors: list[Tensor]) -> None:
    header = {}
    offset = 0
    for tensor in tensors:
        name, shape, dtype = tensor
        end = offset + _nbytes(tensor)
        header[name] = {
            "dtype": _DTYPES[dtype],
            "shape": shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
