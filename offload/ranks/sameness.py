"""Finds out that ranks do not have the same model, or not the same program."""

import json
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version
from typing import Any

from ...io.checkpoint.index import Checkpoint
from ...io.errors import CheckpointError, UsageError
from ...scheduler.ranks.lockstep import agreed
from ...scheduler.ranks.post import Post
from ..files.fingerprint import content_digest, fingerprint
from ..policy import Policy

_SAME = (
    "ranks",
    "dtype",
    "micro_batch_tokens",
    "tokens_in_flight",
    "micro_batch_sequences",
    "sequences_in_flight",
    "prompt_tokens",
    "logits_memory",
    "gather_rows",
    "coalesce",
    "experts",
    "trust_remote_code",
)
"""Keys of a policy by which results differ, or blocks are dealt, or micro-batches are
made. All others may differ: each rank streams from where it likes."""
_SAME_KV = ("dtype", "attention")


def marks_of(checkpoint: Checkpoint, policy: Policy) -> dict[str, str]:
    """What has to be the same on all ranks, by its name: digests of the model's files,
    what of the policy changes results, and versions. Raises CheckpointError."""
    files = [*checkpoint.stamps, checkpoint.folder / "config.json"]
    try:
        found = {path.name: fingerprint(path) for path in files if path.exists()}
    except OSError as error:
        raise CheckpointError(
            f"cannot read {checkpoint.folder}: {error.strerror}"
        ) from error
    found |= {key: f"{getattr(policy, key)}" for key in _SAME}
    found |= {f"kv.{key}": f"{getattr(policy.kv, key)}" for key in _SAME_KV}
    found["device"] = policy.device.partition(":")[0]
    if policy.adapter is not None:
        files = sorted(policy.adapter.glob("adapter_*"))
        found |= {f"adapter {path.name}": content_digest(path) for path in files}
    found |= {name: version(name) for name in ("torch", "transformers")}
    found["penstock"] = import_module(__name__.partition(".")[0]).__version__
    return found


def check_same(post: Post, own: Mapping[str, Any], where: object) -> None:
    """Raises UsageError, on all ranks but the first, if `own` is not what that one has.
    `where` is named in it. All ranks call it at the same place."""
    first = agreed(post, dict(own))
    if first == own:
        return
    if not isinstance(first, dict):
        raise UsageError(f"rank {post.rank} and the first rank run different programs")
    words = _differences(own, first, "there")
    raise UsageError(
        f"rank {post.rank} has not the same as the first rank: {words} "
        f"({where}): give all ranks the same model, options and versions"
    )


def _differences(own: Mapping[str, Any], other: Mapping[str, Any], where: str) -> str:
    """The first three values of `own` that `other` has not, beside those of `other`,
    which is `where`."""
    different = sorted(
        key for key in other.keys() | own.keys() if other.get(key) != own.get(key)
    )
    words = ", ".join(
        f"{key} ({own.get(key, 'none')!s:.40}, {where} {other.get(key, 'none')!s:.40})"
        for key in different[:3]
    )
    return words + (f" and {len(different) - 3} more" if len(different) > 3 else "")


def check_told(peer: int, theirs: str, rank: int, ours: str) -> None:
    """Raises UsageError if what `peer` told of its job differs from what `rank` did."""
    if theirs == ours:
        return
    (other_way, other), (way, own) = json.loads(theirs), json.loads(ours)
    if other_way != way:
        raise UsageError(
            f"ranks {peer} and {rank} share the job in different ways: give all ranks "
            "the same command (ranks: pipeline, or ranks: gather)"
        )
    different = _differences(own, other, f"on rank {peer}")
    raise UsageError(
        f"rank {rank} has not the options of rank {peer}: {different}: give all ranks "
        "the same command"
    )
