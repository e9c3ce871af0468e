"""Makes the engine of a model that several ranks share."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ...io.checkpoint.index import Checkpoint
from ...io.devices.accelerators import accelerators
from ...io.devices.crossing import Crossing
from ...io.devices.device import Device
from ...io.devices.opening import open_device
from ...io.errors import UsageError
from ...io.weights.recipe import Recipe
from ...scheduler.ranks.lockstep import agreed, least
from ...scheduler.ranks.post import Post
from ..configs.checkpoint_folder import checkpoint_folder
from ..configs.opening import open_model
from ..policy import Policy, cache_folder
from ..ranks.exchange import Exchange
from ..ranks.joining import RankEnvironment, join
from ..ranks.rank_device import device_of, num_sharing
from ..ranks.sameness import check_same, marks_of
from ..ranks.share import share_of
from ..settings.memory_budget import MemoryRoom, Use
from ..tensor_ranks.cut_layers import CutLayers, cut_layers
from ..tensor_ranks.row_exchange import RowExchange
from ..tensor_ranks.same_bits import other_bits
from .build import build
from .engine import Engine
from .gathering_tiers import GatheringTiers
from .groups import Ranked


def build_shared(
    model: nn.Module,
    checkpoint: Checkpoint,
    recipes: Mapping[str, Recipe],
    policy: Policy,
    *,
    room: MemoryRoom,
    use: Use = "any",
    post: Post | None = None,
) -> Engine:
    """Like `build`, for this rank's blocks of `model`. The engine closes `post`.

    Without a `post`, the other ranks are those of torchrun's environment; without that,
    this process has the whole model, and says so. Raises also UsageError for a model
    that ranks cannot share or that is another one on the first rank, and RanksError if
    they do not come.
    """
    where = RankEnvironment.of() if post is None else None
    num_ranks = where.num_ranks if where is not None else post.num_ranks if post else 1
    if num_ranks == 1:
        engine = build(model, checkpoint, recipes, policy, room=room, use=use)
        if where is not None and not where.port:
            engine.fallbacks.announce(
                f"ranks: {policy.ranks} has no effect: torchrun has not started this "
                "process (RANK and WORLD_SIZE are not set), which has the whole model"
            )
        return engine
    rank = where.rank if where is not None else post.rank if post else 0
    if policy.ranks is None:
        raise UsageError("only a policy with ranks: shares a model")
    if policy.ranks == "gather":
        post, room = _joined(post, where, room)
        return _build_gathering(
            model, checkpoint, recipes, policy, room=room, use=use, post=post
        )
    num_on_device = 1
    if where is not None:  # a job has divided its policy
        there = accelerators() if policy.device != "cpu" else ()
        num_on_device = num_sharing(policy.device, where.num_local, there)
        name = device_of(policy.device, where.local_rank, there)
        policy = policy.model_copy(update={"device": name})
    device = open_device(policy.device)
    if policy.ranks == "tensor":
        cut = cut_layers(model, recipes, rank=rank, num_ranks=num_ranks)
        post, room = _joined(post, where, room)
        return _build_in_unison(
            model,
            checkpoint,
            cut,
            policy,
            device,
            room=room,
            use=use,
            post=post,
            num_on_device=num_on_device,
        )
    share = share_of(
        model,
        recipes,
        gather_rows=policy.gather_rows,
        rank=rank,
        num_ranks=num_ranks,
        device=device.name,
    )
    post, room = _joined(post, where, room)
    try:
        check_same(post, marks_of(checkpoint, policy), checkpoint.folder)
        exchange = Exchange(post, share.stages, Crossing(device), share.modules.blocks)
        ranked = Ranked(share.modules, exchange, num_on_device)
        engine = build(
            model,
            checkpoint,
            share.recipes,
            policy,
            room=room,
            use=use,
            ranked=ranked,
        )
    except BaseException as error:
        post.close(str(error) or type(error).__name__)
        raise
    for name in share.modules.whole:
        engine.fallbacks.announce(
            f"ranks: each of them streams and computes all {name}"
        )
    return engine


def _joined(
    post: Post | None, where: RankEnvironment | None, room: MemoryRoom
) -> tuple[Post, MemoryRoom]:
    """The other ranks, and the memory of this one. A job has both; else they are those
    of torchrun's environment, `where`."""
    if post is not None:
        return post, room
    assert where is not None, "one of the two says who the others are"
    return join(where), room_of_each(room, where.num_local)


def _build_in_unison(
    model: nn.Module,
    checkpoint: Checkpoint,
    cut: CutLayers,
    policy: Policy,
    device: Device,
    *,
    room: MemoryRoom,
    use: Use,
    post: Post,
    num_on_device: int,
) -> Engine:
    """Like `build`, for the rows that this rank has of the products of `cut`. All ranks
    of `post` have the working set of the one with the least memory, and the same
    division into units: they compute them in the same order."""
    try:
        marks = marks_of(checkpoint, policy)
        marks["device_memory"] = f"{policy.device_memory}"
        check_same(post, marks, checkpoint.folder)
        free = least(post, room.total - room.runtime)
        blocks, layers = cut.modules.blocks, cut.layers
        exchange = RowExchange(post, Crossing(device), blocks, layers, cut.experts)
        engine = build(
            model,
            checkpoint,
            cut.recipes,
            policy,
            room=replace(room, total=room.runtime + free),
            use=use,
            ranked=Ranked(cut.modules, exchange, num_on_device),
        )
    except BaseException as error:
        post.close(str(error) or type(error).__name__)
        raise
    try:
        _check_alike(post, engine)
        own = {
            "division into rows": [[*map(list, one.bounds)] for one in layers],
            "division into experts": [[*map(list, one.bounds)] for one in cut.experts],
        }
        check_same(post, own, checkpoint.folder)
    except BaseException:
        engine.close()
        raise
    for note in (*cut.notes, other_bits(layers, device.name)):
        engine.fallbacks.announce(note or None)
    return engine


def _check_alike(post: Post, engine: Engine) -> None:
    """Raises UsageError, on all ranks, if they do not have the same units: their parts
    may differ by a few rows, and by where these lie in files."""
    own = [site.name for site in engine.model_division.sites]
    if not least(post, agreed(post, own) == own):
        raise UsageError(
            "ranks: tensor: the parts of the ranks differ by a few bytes, and so are "
            "not divided into the same units in a working set of "
            f"{engine.arrangement.capacity:,} bytes: set device_memory to a few per "
            "cent more, or less"
        )


def _build_gathering(
    model: nn.Module,
    checkpoint: Checkpoint,
    recipes: Mapping[str, Recipe],
    policy: Policy,
    *,
    room: MemoryRoom,
    use: Use,
    post: Post,
) -> Engine:
    """Like `build`, with units that all ranks of `post` read together. They have the
    same working set: that of the rank with the least memory."""
    try:
        marks = marks_of(checkpoint, policy)
        marks |= {
            "device_memory": f"{policy.device_memory}",
            "io.max_gap": f"{policy.io.max_gap}",
        }
        check_same(post, marks, checkpoint.folder)
        runtime = room.runtime + _bytes_on_their_way(recipes, policy)
        free = least(post, room.total - runtime)
        room = replace(room, total=runtime + free, runtime=runtime)
        return build(
            model,
            checkpoint,
            recipes,
            policy,
            room=room,
            use=use,
            tiers_of=partial(GatheringTiers, post),
        )
    except BaseException as error:
        post.close(str(error) or type(error).__name__)
        raise


def _bytes_on_their_way(recipes: Mapping[str, Recipe], policy: Policy) -> int:
    """The memory for parts of two units: one is sent while the next is read. A unit is
    a block or, where no two blocks fit into the working set, less."""
    blocks: Counter[str] = Counter()
    for name, recipe in recipes.items():
        parts = name.split(".")
        place = next((at for at, one in enumerate(parts) if one.isdigit()), len(parts))
        blocks[".".join(parts[: place + 1])] += recipe.nbytes
    nbytes = 2 * max(blocks.values(), default=0)
    is_set = isinstance(policy.device_memory, int)
    return min(nbytes, int(policy.device_memory)) if is_set else nbytes


def check_shareable(path: str | Path, policy: Policy, num_ranks: int) -> None:
    """Raises UsageError if `num_ranks` cannot share the model, before any of them has
    begun, and what `load` raises for one that cannot be opened."""
    from ..weights import hf  # transformers takes seconds to import

    checkpoint = open_model(checkpoint_folder(path), cache_folder(policy.io))
    with torch.device("cpu"):
        skeleton = hf.build(
            checkpoint, policy.dtype, trust_remote_code=policy.trust_remote_code
        )
    if policy.ranks == "tensor":
        cut_layers(skeleton.model, skeleton.recipes, rank=0, num_ranks=num_ranks)
        return
    share_of(
        skeleton.model,
        skeleton.recipes,
        gather_rows=policy.gather_rows,
        rank=0,
        num_ranks=num_ranks,
    )


def room_of_each(room: MemoryRoom, num_local: int) -> MemoryRoom:
    """The room of one of `num_local` ranks of a machine, which divide what is free
    there. A number that the policy sets is for each."""
    if room.is_asked:
        return room
    free = max(room.total - room.runtime, 0)
    return replace(room, total=room.runtime + free // num_local)
