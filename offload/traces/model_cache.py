"""Says what a model keeps of each token, and where it attends: traced, or derived from
its config where it cannot be traced."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ...scheduler.cost.shape import SiteCost
from .cache_contents import Kept
from .cache_trace import trace_cache
from .cache_watch import NotTracedError
from .model_kind import completes

_LAYER = re.compile(r"^(.*?\.\d+)(?:\.|$)")
_OTHER_SENSES = re.compile(r"(^|[._])(vision|visual|image|audio|video|speech)")


@dataclass(frozen=True)
class ModelCache:
    """What the modules of a model keep, by their names."""

    kept: Mapping[str, Kept]
    state_bytes: int = 0
    """Bytes of a sequence that no single module keeps."""
    ran: frozenset[int] | None = None
    """The ids of the modules that run for text; None: all do."""
    heads: int = 0
    """The width of all heads of a layer, where the trace did not see it."""
    note: str = ""

    def put_into(
        self, sites: Sequence[SiteCost], modules: Sequence[nn.Module]
    ) -> tuple[SiteCost, ...]:
        """`sites`, each of one of the `modules`, with what is kept in them."""
        indices = {site.name: index for index, site in reversed([*enumerate(sites)])}
        made = [
            replace(site, runs_for_text=self._runs(module))
            for site, module in zip(sites, modules, strict=True)
        ]
        for name, kept in self.kept.items():
            index = _site_of(name, indices) if name else 0
            if index is not None and made:
                made[index] = _with(made[index], kept, self.heads)
        return tuple(made)

    def _runs(self, module: nn.Module) -> bool:
        if self.ran is None:
            return True
        return any(id(part) in self.ran for part in module.modules())


def model_cache(model: Any) -> ModelCache:
    """What `model` keeps; nothing if it cannot generate. The model may be on meta, or
    its weights be streamed."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return ModelCache({})
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    width = _width(text, heads) if isinstance(heads, int) else 0
    derived = _derived(model, text, heads) if isinstance(heads, int) else {}
    try:
        found = trace_cache(model)
    except NotTracedError as error:
        note = (
            "keys and values are derived from the config: "
            f"{type(model).__name__} cannot be traced without weights ({error})"
        )
        note = note if completes(model) else ""
        of_text = _ids(model, frozenset(_text_only(model)))
        return ModelCache(derived, ran=of_text, heads=width, note=note)
    kept = found.kept
    if not any(_attends(each) or each.width for each in kept.values()):
        kept = {n: Kept(width=width) for n in derived} | dict(kept)
    ran = None if found.ran is None else _ids(model, found.ran)
    return ModelCache(kept, found.state_bytes, ran, width)


def _with(site: SiteCost, kept: Kept, heads: int) -> SiteCost:
    return replace(
        site,
        attention_width=site.attention_width + (kept.width or _attends(kept) * heads),
        kv_per_token=site.kv_per_token + kept.per_token,
        own_kv_per_token=site.own_kv_per_token + kept.own_per_token,
        cross_kv_per_token=site.cross_kv_per_token + kept.cross_per_token,
        state_bytes=site.state_bytes + kept.state_bytes,
        attention_window=kept.window or site.attention_window,
        expanded_per_token=max(site.expanded_per_token, kept.expanded_per_token),
        expanded_flops=site.expanded_flops + kept.expanded_flops,
    )


def _attends(kept: Kept) -> bool:
    return bool(kept.per_token or kept.own_per_token or kept.cross_per_token)


def _site_of(name: str, indices: Mapping[str, int]) -> int | None:
    """The site that holds the module `name`, or the first one inside it."""
    for up in _upwards(name):
        if up in indices:
            return indices[up]
    inside = [index for site, index in indices.items() if site.startswith(f"{name}.")]
    return min(inside, default=None)


def _upwards(name: str) -> Iterator[str]:
    """`name`, and the names of the modules around it."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _ids(model: nn.Module, names: frozenset[str]) -> frozenset[int]:
    """The ids of the modules of these names."""
    return frozenset(id(m) for name, m in model.named_modules() if name in names)


def _text_only(model: nn.Module) -> list[str]:
    """The names of the modules that are of no other sense, in their order."""
    names = (name for name, _ in model.named_modules())
    return [name for name in names if not _OTHER_SENSES.search(name)]


def _derived(model: nn.Module, config: Any, heads: int) -> dict[str, Kept]:
    """What each layer keeps by its config, at the first module with "att" in its
    name."""
    layers: dict[str, list[str]] = defaultdict(list)
    for name in _text_only(model):
        if (match := _LAYER.match(name)) is not None:
            layers[match[1]].append(name)
    kinds = getattr(config, "layer_types", None) or []
    window = getattr(config, "sliding_window", None)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if getattr(config, "multi_query", False):
        kv_heads = 1
    found = {}
    for number, (layer, names) in enumerate(layers.items()):
        kind = kinds[number] if number < len(kinds) else "full_attention"
        if "attention" not in kind or kind == "linear_attention":
            continue
        named = [n for n in names if "att" in n.removeprefix(layer).lower()]
        is_sliding = kind == "sliding_attention" and window
        found[(named or names)[0]] = Kept(
            per_token=2 * kv_heads * size, window=window if is_sliding else None
        )
    return found


def _width(config: Any, heads: int) -> int:
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(heads * size)
