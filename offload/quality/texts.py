"""Scores the same texts with two checkpoints, one after the other."""

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...io.errors import InputError
from ..files.inputs import Inputs
from ..files.parts import Position
from ..jobs.choosing import choose, mean_length
from ..model import load_for
from ..plans.planned import Workload
from ..policy import Policy, cache_folder
from ..tasks.score_task import Score
from .score_file import ScoreFile
from .stages import Stages
from .text_quality import TextQuality
from .token_scores import TokenScores, TokenScoring


@dataclass(frozen=True)
class Texts:
    """The rows that both models score, and in which windows."""

    inputs: Inputs
    window: int | None = None
    """Tokens of a window; None: a text longer than the model's context is an error."""

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows, from the first one on."""
        with closing(self.inputs.rows(Position())) as found:
            for row in found:
                yield row.row


def settled(original: Path, policy: Policy, texts: Texts, stages: Stages) -> Policy:
    """`policy` with what a job of `penstock score` chooses for the original, which both
    models compute with."""
    length = mean_length(texts.inputs, Score.row_keys)
    chosen = choose(original, policy, Workload(Score(texts.window), length))
    stages.say(chosen.words)
    return chosen.policy


def compare_texts(
    model: Path,
    original: Path,
    policy: Policy,
    texts: Texts,
    stages: Stages,
) -> TextQuality:
    """Scores all texts with the original, then with the model. Only one of them is
    loaded at a time; scores of tokens wait in a file in the cache folder.

    `policy` names the dtype of both. Raises InputError if no row can be scored by both,
    or if they make other tokens of a row.
    """
    quality = TextQuality(policy.dtype)
    with ScoreFile(cache_folder(policy.io)) as kept:
        with closing(_scored(original, policy, texts, stages, "original")) as scored:
            for result in scored:
                kept.put(result.get("scores"))
                if "error" in result:
                    quality.fail(result["id"], result["error"])
        with closing(_scored(model, policy, texts, stages, "model")) as scored:
            for result, other in zip(scored, kept.rows(), strict=True):
                if other is None:
                    continue
                if "error" in result:
                    quality.fail(result["id"], result["error"])
                    continue
                _check_tokens(result["id"], result["scores"], other, model, original)
                quality.add(result["scores"], other)
    if quality.tokens == 0:
        why = quality.first_error or f"{texts.inputs.files[0].name} is empty"
        raise InputError(f"there is no row that both models can score: {why}")
    return quality


def _scored(
    folder: Path, policy: Policy, texts: Texts, stages: Stages, which: str
) -> Generator[dict[str, Any], None, None]:
    with load_for("rows", folder, policy) as streamed:
        task = TokenScoring(texts.window)
        total = texts.inputs.num_rows
        results = task.run(streamed, texts.rows())
        yield from stages.each(results, f"scoring with the {which}", total)


def _check_tokens(
    identity: Any, one: TokenScores, other: TokenScores, model: Path, original: Path
) -> None:
    if (one.ids_digest, len(one.tops)) != (other.ids_digest, len(other.tops)):
        raise InputError(
            f"row {identity!r:.60} has other tokens in {model} ({len(one.tops)} are "
            f"scored) than in {original} ({len(other.tops)}), so perplexities cannot "
            f"be compared: copy the tokenizer's files of {original} to {model}"
        )
