"""Whether rows of a product that are computed alone have the bits of the whole."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .cut_layers import CutLayer
from .row_cuts import Bounds

_TOKENS = (1, 2, 5, 16, 33)
_MOST_BYTES = 32 << 20
"""The largest weight that is tried; of larger ones, the first inputs."""


def other_bits(layers: Sequence[CutLayer], device: str) -> str:
    """What to announce about the layers whose results may have other last bits than
    those of one process, by trying each kind of them on `device`; "" if none has."""
    known: dict[object, bool] = {}
    names = []
    for layer in layers:
        weight = layer.module.get_parameter("weight")
        num_inputs = weight.shape[0 if layer.is_by_columns else 1]
        bias = layer.module._parameters["bias"] is not None
        kind = num_inputs, tuple(layer.bounds), weight.dtype, layer.is_by_columns, bias
        if kind not in known:
            known[kind] = _is_same(*kind, device)
        if not known[kind]:
            names.append(layer.name)
    if not names:
        return ""
    return (
        f"ranks: rows of {len(names)} products ({names[0]}, ...) that are computed "
        "alone have other last bits here than in one process: results are those of one "
        "process but for rounding, and the same on all ranks"
    )


def _is_same(
    num_inputs: int,
    bounds: Bounds,
    dtype: torch.dtype,
    is_by_columns: bool,
    has_bias: bool,
    device: str,
) -> bool:
    num_outputs = bounds[-1][1]
    num_inputs = min(num_inputs, max(64, _MOST_BYTES // (num_outputs * dtype.itemsize)))
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        numbers = torch.randn(shape, generator=generator, device="cpu")
        return numbers.to(dtype).to(device)

    weight = made(num_outputs, num_inputs)
    weight = weight.t().contiguous() if is_by_columns else weight
    bias = made(num_outputs) if has_bias else None

    def product(x: torch.Tensor, low: int, high: int) -> torch.Tensor:
        part = None if bias is None else bias[low:high].clone()
        if not is_by_columns:
            return F.linear(x, weight[low:high].clone(), part)
        own = weight[:, low:high].contiguous()
        return x @ own if part is None else torch.addmm(part, x, own)

    with torch.no_grad():
        for num in _TOKENS:
            x = made(num, num_inputs)
            whole = product(x, 0, num_outputs)
            parts = torch.cat([product(x, *one) for one in bounds], dim=-1)
            if not torch.equal(whole, parts):
                return False
    return True
