"""Compares a checkpoint with the one that it was made from: weights, then texts."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...io.errors import UsageError
from ..machines.computer import computer, versions
from ..policy import Policy
from ..tasks.score_task import Score
from .pair import Pair, check_tokenizers, open_pair
from .stages import Stages
from .text_quality import TextQuality
from .texts import Texts, compare_texts, settled
from .weight_errors import UnitError, WeightError, added, worst_of


@dataclass(frozen=True)
class Comparison:
    """How far a model is from its original."""

    model: Path
    original: Path
    dtype: str
    """The dtype in which weights were compared."""
    units: tuple[UnitError, ...]
    """Each unit, in the order of the model."""
    texts: TextQuality | None
    """None where no texts were given."""
    notes: tuple[str, ...]
    """What config.json of both say differently, and the like."""
    seconds: float

    @property
    def total(self) -> WeightError:
        """All weights together."""
        return added("all", (unit.total for unit in self.units))

    @property
    def num_tensors(self) -> int:
        return sum(unit.num_tensors for unit in self.units)

    @property
    def num_identical(self) -> int:
        """How many tensors are identical."""
        return sum(unit.num_identical for unit in self.units)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weights in the files of the model."""
        return sum(unit.stored_bytes for unit in self.units)

    @property
    def original_bytes(self) -> int:
        """Bytes of the weights in the files of the original."""
        return sum(unit.original_bytes for unit in self.units)

    def figures(self) -> dict[str, Any]:
        """All figures as JSON takes them. Errors are shares, 0 is none; a value that is
        no number is null."""
        worst = worst_of(u.worst for u in self.units if u.worst is not None)
        return {
            "model": str(self.model),
            "original": str(self.original),
            "weights": {
                "dtype": self.dtype,
                "num_tensors": self.num_tensors,
                "num_identical": self.num_identical,
                "stored_bytes": self.stored_bytes,
                "original_stored_bytes": self.original_bytes,
                **_error(self.total),
                "worst": worst and {"name": worst.name, **_error(worst)},
            },
            "units": [
                {
                    "unit": unit.total.name,
                    "num_tensors": unit.num_tensors,
                    "num_identical": unit.num_identical,
                    "stored_bytes": unit.stored_bytes,
                    "original_stored_bytes": unit.original_bytes,
                    **_error(unit.total),
                    "worst": unit.worst
                    and {"name": unit.worst.name, **_error(unit.worst)},
                }
                for unit in self.units
            ],
            "texts": None if self.texts is None else self.texts.figures(),
            "notes": list(self.notes),
            "seconds": self.seconds,
            "computer": computer(),
            "versions": versions(),
        }


def _error(error: WeightError) -> Mapping[str, Any]:
    return {
        "num_weights": error.num_weights,
        "is_identical": error.is_identical,
        "relative_error": error.relative,
        "largest_difference": error.largest if math.isfinite(error.largest) else None,
    }


def compare(
    model: Path,
    original: Path,
    policy: Policy,
    texts: Texts | None,
    stages: Stages,
) -> Comparison:
    """Compares the checkpoint in the folder `model` with that in `original`.

    Weights are compared one tensor at a time, in the policy's dtype or else the
    original's. `texts` are scored by both, streamed under `policy`, one after the
    other. Raises UsageError if the two do not belong together, and what loading and
    scoring raise.
    """
    began = time.perf_counter()
    pair = _opened(model, original, policy, texts)
    for note in pair.notes:
        stages.say(note)
    if texts is not None:
        policy = settled(original, policy, texts, stages)
        if policy.dtype == "auto":
            policy = policy.with_settings([f"dtype={json.dumps(pair.dtype)}"])
    units = tuple(stages.each(pair.errors(), "comparing weights", len(pair.units)))
    quality = None
    if texts is not None:
        quality = compare_texts(model, original, policy, texts, stages)
    seconds = time.perf_counter() - began
    return Comparison(model, original, pair.dtype, units, quality, pair.notes, seconds)


def _opened(model: Path, original: Path, policy: Policy, texts: Texts | None) -> Pair:
    """Checks all that can be checked before anything takes long."""
    if policy.adapter is not None:
        raise UsageError(
            f"checkpoints are compared without an adapter: take adapter "
            f"({policy.adapter}) out of the policy"
        )
    pair = open_pair(model, original, policy)
    if texts is not None:
        for skeleton in (pair.model, pair.original):
            Score().check_model(skeleton.model)
        trusted = policy.trust_remote_code
        check_tokenizers(model, original, trust_remote_code=trusted)
    return pair
