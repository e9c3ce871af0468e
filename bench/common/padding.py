"""Pads prompts of different lengths to one batch. Needs nothing but torch."""

from collections.abc import Sequence

import torch


def padded_left(
    prompts: Sequence[Sequence[int]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids, padded with 0 on the left, and the mask, 1 where there is a prompt; both
    are int64 [prompts, longest prompt]."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask
