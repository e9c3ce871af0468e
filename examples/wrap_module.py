"""Streams a module that transformers does not know: a diffusion transformer.

    python examples/wrap_module.py
    python examples/wrap_module.py --layers 12 --width 1024 --device-memory 256MiB

`penstock.wrap` takes any `nn.Module`: here the transformer of Flux, with random
weights, if diffusers is installed, and otherwise a small one in plain PyTorch. It
denoises a few latents that share each pass over the weights, and compares with the
resident module.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: see docs/limits.md

import torch
from torch import nn

from penstock import PenstockError, Policy, statistics, sweep, unwrap, wrap

HEAD_WIDTH = 128
CHANNELS = 64
TOKENS = 64
Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From latents (float32, batch x TOKENS x CHANNELS) and a time (float32, batch) to
what is taken away from them (the shape of the latents)."""


class Block(nn.Module):
    """Attention and an MLP, both scaled and shifted by the time (DiT's adaLN)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 4 * width)
        self.attention = nn.MultiheadAttention(
            width, width // HEAD_WIDTH, batch_first=True
        )
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        scale, shift, mlp_scale, mlp_shift = self.modulation(time)[:, None].chunk(4, -1)
        at = self.norm(tokens) * (1 + scale) + shift
        tokens = tokens + self.attention(at, at, at, need_weights=False)[0]
        at = self.norm(tokens) * (1 + mlp_scale) + mlp_shift
        return tokens + self.mlp(at)  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A diffusion transformer in plain PyTorch."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(CHANNELS, width)
        self.time = nn.Linear(1, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.leave = nn.Linear(width, CHANNELS)

    def forward(self, latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        tokens, at_time = self.enter(latents), self.time(time[:, None])
        for block in self.blocks:
            tokens = block(tokens, at_time)
        return self.leave(tokens)  # type: ignore[no-any-return]


def diffusers_transformer(layers: int, width: int) -> tuple[nn.Module, Denoise]:
    """Flux's transformer with a text of zeros. ImportError without diffusers."""
    from diffusers import FluxTransformer2DModel

    model: Any = FluxTransformer2DModel(
        in_channels=CHANNELS,
        num_layers=layers // 3,
        num_single_layers=layers - layers // 3,
        num_attention_heads=width // HEAD_WIDTH,
        attention_head_dim=HEAD_WIDTH,
        joint_attention_dim=width,
        pooled_projection_dim=width,
    )

    def denoise(latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(
            hidden_states=latents,
            encoder_hidden_states=latents.new_zeros(len(latents), 8, width),
            pooled_projections=latents.new_zeros(len(latents), width),
            timestep=time,
            img_ids=latents.new_zeros(TOKENS, 3),
            txt_ids=latents.new_zeros(8, 3),
            return_dict=False,
        )[0]
        return found

    return model, denoise


def a_transformer(layers: int, width: int) -> tuple[nn.Module, Denoise]:
    torch.manual_seed(0)
    try:
        model, denoise = diffusers_transformer(layers, width)
    except ImportError:
        print(
            "diffusers is not installed: taking a diffusion transformer in plain "
            "PyTorch instead (pip install diffusers for the one of Flux)"
        )
        model = Transformer(layers, width)
        denoise = model
    return model.eval().requires_grad_(False), denoise


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512, help="a multiple of 128")
    parser.add_argument("--latents", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device-memory", default="64MiB", help="for weights")
    args = parser.parse_args()
    if args.width < HEAD_WIDTH or args.width % HEAD_WIDTH:
        parser.error(f"--width {args.width} is no multiple of {HEAD_WIDTH}")

    model, denoise = a_transformer(args.layers, args.width)

    @torch.inference_mode()
    def sample(latents: torch.Tensor) -> torch.Tensor:
        """All steps of one micro-batch, in plain PyTorch."""
        for step in range(args.steps):
            time = torch.full((len(latents),), 1 - step / args.steps)
            latents = latents - denoise(latents, time) / args.steps
        return latents

    latents = [torch.randn(1, TOKENS, CHANNELS) for _ in range(args.latents)]
    resident = [sample(each) for each in latents]

    wrap(model, Policy(device_memory=args.device_memory))
    with sweep(model) as sharing:  # one pass over the weights for all latents, a step
        streamed = sharing.map(sample, latents)
    counts = statistics(model)
    unwrap(model)  # the module has its own weights again

    same = all(map(torch.equal, resident, streamed))
    print(
        f"{args.latents} latents, {args.steps} steps: {counts.passes} passes over "
        f"{counts.model_bytes / 2**20:,.1f} MiB of weights, at most "
        f"{counts.peak_device_bytes / 2**20:,.1f} MiB of them in memory\n"
        f"the same as the resident module, bit for bit: {'yes' if same else 'no'}"
    )


if __name__ == "__main__":
    try:
        main()
    except PenstockError as error:
        sys.exit(str(error))
