"""Makes one vector for a text from the vectors of its tokens, as the checkpoint's files
or the user say."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from ...io.errors import CheckpointError, UsageError
from ...io.regular_file import read_json, read_json_object
from ..settings.values import Pooling

_SENTENCE_KEYS: dict[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}
_SENTENCE_MODES: dict[str, Pooling] = {
    "cls": "cls",
    "mean": "mean",
    "max": "max",
    "lasttoken": "last",
}
"""The names of `pooling_mode` in files of sentence-transformers 6 and later."""
_KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True, slots=True)
class Pooled:
    """A way to make one vector of several."""

    pooling: Pooling
    normalize: bool
    """Whether the vector is scaled to length 1."""

    def __call__(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """One vector a row, float32 [rows, dim], from `hidden` [rows, tokens, dim].
        `mask` [rows, tokens] is 0 at padding."""
        found = _POOLINGS[self.pooling](hidden.float(), mask)
        return torch.nn.functional.normalize(found, dim=-1) if self.normalize else found


def pooled(model: Any, pooling: str, normalize: bool | None) -> Pooled:
    """The pooling and normalization that are asked for. `auto` and None are as the
    checkpoint's sentence-transformers files say; without such files, the mean of an
    encoder's tokens or the last token of a decoder (the only one that has seen all of
    the text), and no normalization.

    Raises UsageError for an unknown pooling, CheckpointError for one in the files that
    Penstock does not have.
    """
    if pooling not in get_args(Pooling):
        known = ", ".join(get_args(Pooling))
        raise UsageError(f"there is no pooling {pooling!r}: {known}")
    own = _own(Path(model.config.name_or_path), pooling)
    if own is None:
        is_decoder = model.can_generate() and not model.config.is_encoder_decoder
        own = Pooled("last" if is_decoder else "mean", normalize=False)
    return Pooled(
        own.pooling if pooling == "auto" else pooling,  # type: ignore[arg-type]
        own.normalize if normalize is None else normalize,
    )


def _own(folder: Path, asked: str) -> Pooled | None:
    """What the sentence-transformers files beside the checkpoint say; None without such
    files. Their pooling is not read where another one is `asked` for."""
    if not (folder / "modules.json").is_file():
        return None
    modules = read_json(folder / "modules.json")
    try:
        kinds = {module["type"].rpartition(".")[2]: module for module in modules}
        paths = {kind: folder / module["path"] for kind, module in kinds.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}/modules.json is no list of sentence-transformers' modules "
            f"({error!r}): take it out, or download it again"
        ) from None
    others = [kind for kind in kinds if kind not in _KNOWN_MODULES]
    if others:
        raise CheckpointError(
            f"{folder / 'modules.json'} makes vectors with {', '.join(others)}, which "
            f"Penstock has not: it knows {', '.join(_KNOWN_MODULES)}. Hidden states "
            "alone would be other vectors than the model's"
        )
    if "Pooling" not in paths:
        return None
    path = paths["Pooling"] / "config.json"
    found = _pooling_in(path) if asked == "auto" else asked
    return Pooled(found, "Normalize" in kinds)  # type: ignore[arg-type]


def _pooling_in(path: Path) -> Pooling:
    """Reads the options of sentence-transformers' Pooling module, in either
    spelling."""
    config = read_json_object(path)
    modes = [key for key, value in config.items() if "_mode_" in key and value is True]
    named = config.get("pooling_mode")
    if named is not None and not modes:
        modes = [str(one) for one in (named if isinstance(named, list) else [named])]
    known = {**_SENTENCE_KEYS, **_SENTENCE_MODES}
    if len(modes) != 1 or modes[0] not in known:
        raise CheckpointError(
            f"{path} asks for {', '.join(modes) or 'no pooling'}: name one of "
            f"{', '.join(get_args(Pooling))} (--pooling mean)"
        )
    return known[modes[0]]


def _mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask[:, :, None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def _max(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return hidden.masked_fill(mask[:, :, None] == 0, -torch.inf).amax(1)


def _last(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return hidden[torch.arange(len(mask), device=mask.device), mask.sum(1) - 1]


_POOLINGS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cls": lambda hidden, mask: hidden[:, 0],
    "last": _last,
    "max": _max,
    "mean": _mean,
}
