"""Works out how much memory a model can use under a policy."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from ...io.kv.tiers import PENDING_BYTES
from ...io.readers.files import ALIGNMENT
from ...io.tier import Tier
from ...io.weights.recipe import Recipe
from ...scheduler.cost.memory_need import generating_need, scoring_need
from ...scheduler.cost.shape import ModelShape
from ..policy import Policy
from ..settings.contradictions import keeps_kv
from ..settings.memory_budget import MemoryWish, Use
from ..traces.model_cache import ModelCache, model_cache
from .capacity import least_capacity
from .describe import describe
from .division import Division

_PAGES = 8192
"""A tensor that is read in place takes up to two pages more than it has bytes."""
_BUFFERS = 4
"""The number of bounce buffers: two for each of the two threads that cast and
assemble."""
_LOGIT_BYTES = 12
"""Bytes of one logit: in the model's dtype, in float32, and a temporary copy of
that."""
_LEAST_WORKSPACE = 8 << 20
"""Bytes of one micro-batch, if the model cannot be described."""


_PROMPT_TOKENS, _NEW_TOKENS = 128, 64
"""The assumed lengths of a prompt and of its completion, until they are known."""


class _Activations(NamedTuple):
    computing: int
    """Bytes of one micro-batch while it computes."""
    waiting: int
    """Bytes of all micro-batches in flight."""


@dataclass(frozen=True)
class Wishes:
    """Works out the memory wish of one model for several policies."""

    model: Any
    recipes: Mapping[str, Recipe]
    divide: Callable[[int], Division]
    """Divides the model for a working set of this many bytes."""

    def of(self, policy: Policy, use: Use, *, is_host: bool) -> MemoryWish:
        """The memory that the model can use under `policy`, for `use`.

        `is_host` says whether the working set is in host memory.
        """
        whole = sum(recipe.nbytes for recipe in self.recipes.values())
        whole += _PAGES * (len(self.recipes) + 1)
        division = self.divide(2 * whole)
        need = self._need(division, policy, use)
        waits_here = is_host or policy.activations == "host"
        computing = max(need.computing if is_host else 0, _LEAST_WORKSPACE)
        waiting = need.waiting if waits_here else 0
        weights = self._weights(division, policy, whole) if is_host else {}
        return MemoryWish(
            fixed=_fixed(policy, division, whole, use, is_host=is_host),
            **weights,
            least_activations=computing,
            activations=computing + waiting,
            keeps_kv=keeps_kv(policy),
        )

    def _weights(
        self, division: Division, policy: Policy, whole: int
    ) -> dict[str, int]:
        """The sizes of the working set, from the least to the whole model."""
        if policy.device_memory != "auto":
            names = ("least", "paired", "ahead", "whole")
            taken = min(policy.device_memory, whole)
            return {f"{name}_weights": taken for name in names}
        resident, by_site = division.needs()
        largest = max(by_site, default=0)
        blocks = (
            nbytes
            for site, nbytes in zip(division.found.sites, by_site, strict=True)
            if any(True for _ in site.module.children())
        )
        paired = max(division.paired_bytes(), resident + 2 * max(blocks, default=0))
        ahead = resident + (1 + policy.lookahead) * largest
        return {
            "least_weights": min(
                least_capacity(self.divide, 1, ALIGNMENT) + _PAGES, whole
            ),
            "paired_weights": min(paired + _PAGES, whole),
            "ahead_weights": min(ahead + _PAGES, whole),
            "whole_weights": whole,
        }

    def _need(self, division: Division, policy: Policy, use: Use) -> "_Activations":
        """The activations of all that the policy has in flight."""
        has_caches = use == "completions" and not keeps_kv(policy)
        shape = self.shape(division, has_caches=has_caches)
        if shape is None or not shape.hidden:
            return _Activations(0, 0)
        each = policy.micro_batch_tokens
        logits = min(policy.logits_memory, each * shape.vocabulary * _LOGIT_BYTES)
        computing = scoring_need(shape, 0, each, logits).activations
        if use == "completions":
            return _Activations(computing, _of_completions(shape, policy))
        need = scoring_need(shape, policy.tokens_in_flight, each, logits)
        return _Activations(computing, need.activations - computing)

    def shape(self, division: Division, *, has_caches: bool) -> ModelShape | None:
        """The model's costs; None if it has no config of transformers. Without
        `has_caches`, what it keeps of each token is not found out, and is none."""
        config = getattr(self.model, "config", None)
        if not hasattr(config, "get_text_config"):
            return None
        return describe(
            self.model,
            division,
            self.recipes,
            gathers_rows=False,
            has_units=False,
            cache=self._cache if has_caches else ModelCache({}),
        )

    @cached_property
    def _cache(self) -> ModelCache:
        return model_cache(self.model)


def cache_bytes_per_token(
    model: Any, division: Division, recipes: Mapping[str, Recipe]
) -> int:
    """Bytes that a token adds to a cache of transformers; 0 for a module without a
    config of transformers."""
    wishes = Wishes(model, recipes, lambda _: division)
    shape = wishes.shape(division, has_caches=True)
    return 0 if shape is None else shape.kv_bytes_per_token


def _of_completions(shape: ModelShape, policy: Policy) -> int:
    """Bytes of the activations of all sequences in flight, with their keys and values
    unless tiers keep those."""
    need = generating_need(
        shape,
        policy.sequences_in_flight,
        _PROMPT_TOKENS,
        _NEW_TOKENS,
        policy.micro_batch_sequences,
        chunk_tokens=1,
    )
    return need.activations + (0 if keeps_kv(policy) else need.kv + need.states)


def _fixed(
    policy: Policy, division: Division, whole: int, use: Use, *, is_host: bool
) -> int:
    """Bytes of buffers, and of parts whose size the policy sets."""
    found = _BUFFERS * policy.io.bounce + (policy.host_memory or 0)
    found = min(found, _BUFFERS * policy.io.bounce + whole)
    found += min(policy.peer.get("cpu", 0), whole)
    ways = int(not is_host or Tier.DISK in policy.links) + len(policy.peer)
    if ways:
        largest = max((plan.nbytes for plan in division.layouts), default=0)
        asked = policy.staging_memory
        found += ways * (3 * largest if asked == "auto" else max(asked, largest))
    if use != "rows" and keeps_kv(policy):
        limits = policy.kv.limits
        if policy.memory != "auto":
            found += limits.get("host", 0) + (is_host and limits.get("device", 0))
        found += PENDING_BYTES if policy.kv.tier == "disk" else 0
    return found
