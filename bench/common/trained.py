"""Trains a small Llama in minutes, so that its perplexity means something."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from common.models import SIZES, write_tokenizer

_TOKENIZER_BYTES = 1_000_000
_LEAST_CONTEXT = 256
_WARM_UP = 0.05
_LEARNING_RATE = 3e-3


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is trained, and for how long."""

    hidden: int
    layers: int
    vocabulary: int
    steps: int
    batch: int
    """Sequences of a step."""
    length: int
    """Tokens of a sequence."""
    seed: int

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=4 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=self.hidden // 64,
            vocab_size=self.vocabulary,
            max_position_embeddings=max(_LEAST_CONTEXT, 2 * self.length),
            bos_token_id=0,
            eos_token_id=1,
        )


def trained(folder: Path, training: Training, texts: Sequence[str]) -> dict[str, Any]:
    """Trains a model on `texts`, and saves it to `folder` in bfloat16, with its
    tokenizer. Returns the seconds it took, and the last losses (nats a token)."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny = SIZES["tiny"]
    size = {name: getattr(tiny, name) for name in tiny.__slots__} | {
        "vocabulary": training.vocabulary,
        "training_text_bytes": _TOKENIZER_BYTES,
    }
    write_tokenizer(folder, type(tiny)(**size))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = tokenizer(list(texts), verbose=False)["input_ids"]
    ids = [token for of_text in found for token in of_text]
    torch.manual_seed(training.seed)
    model: Any = LlamaForCausalLM(training.config())
    began = time.perf_counter()
    losses = _train(model, torch.tensor(ids), training)
    seconds = time.perf_counter() - began
    model.to(torch.bfloat16).save_pretrained(folder)
    last = losses[-max(1, len(losses) // 20) :]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "text_tokens": len(ids),
        "trained_tokens": training.steps * training.batch * training.length,
        "training_seconds": seconds,
        "training_loss": sum(last) / len(last),
    }


def _train(model: Any, ids: torch.Tensor, training: Training) -> list[float]:
    generator = torch.Generator().manual_seed(training.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _rate((step + 1) / training.steps)
    )
    starts = len(ids) - training.length
    losses = []
    for step in range(training.steps):
        first = torch.randint(starts, (training.batch,), generator=generator)
        batch = torch.stack([ids[i : i + training.length] for i in first.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % 50 == 0:
            print(f"step {step:5}: loss {losses[-1]:.3f}", flush=True)
    return losses


def _rate(share: float) -> float:
    """The learning rate, from 0 to 1, when `share` of the steps are done."""
    if share < _WARM_UP:
        return share / _WARM_UP
    return 0.55 + 0.45 * math.cos(math.pi * (share - _WARM_UP) / (1 - _WARM_UP))


def write_rows(path: Path, texts: Sequence[str]) -> Path:
    """Writes `texts` as rows to score. Returns the path."""
    rows = (json.dumps({"id": i, "text": text}) for i, text in enumerate(texts))
    path.write_text("\n".join(rows) + "\n")
    return path
