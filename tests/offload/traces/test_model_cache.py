"""What models keep of each token: traced on meta, against the caches that they fill."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from giants import SMALL, small, write
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, EncoderDecoderCache

import zoo
from penstock.offload.configs.hf_config import model_class_of, read_config
from penstock.offload.traces.model_cache import ModelCache, model_cache
from penstock.scheduler.cost.memory_need import CacheBytes, cache_bytes
from penstock.scheduler.cost.shape import ModelShape, SiteCost
from shares import shared

ROWS, TOKENS = 2, 12
_DERIVED = {"jetmoe"}
"""Its attention sends tokens to experts: it does not run without values."""
_CACHES = ("past_key_values", "cache_params", "state", "mems")


def shape_of(cache: ModelCache, model: nn.Module) -> ModelShape:
    """A shape with a site for each module that keeps something, in float32."""
    names = list(cache.kept) or [""]
    modules = [model.get_submodule(name) for name in names]
    sites = cache.put_into([SiteCost(name) for name in names], modules)
    return ModelShape(sites, (), 4, 64, state_bytes=cache.state_bytes, note=cache.note)


def real_bytes(values: Any) -> int:
    """The bytes of the floating tensors in caches of any kind."""
    found: dict[int, int] = {}

    def look(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            if value.is_floating_point():
                found[id(value)] = value.numel() * value.element_size()
        elif isinstance(value, dict):
            look(list(value.values()))
        elif isinstance(value, list | tuple):
            for each in value:
                look(each)
        elif isinstance(value, EncoderDecoderCache):
            look([value.self_attention_cache, value.cross_attention_cache])
        elif isinstance(value, Cache):
            look([vars(layer) for layer in value.layers])
        elif hasattr(value, "__dict__"):
            look(vars(value))

    look(values)
    return sum(found.values())


def filled(model: Any, given: dict[str, torch.Tensor]) -> Any:
    """The caches that a forward of `model` makes."""
    known = inspect.signature(type(model).forward).parameters
    asked: dict[str, Any] = {"use_cache": True} if "use_cache" in known else {}
    made: list[Cache] = []
    note = Cache.update

    def noted(self: Cache, *args: Any, **kwargs: Any) -> Any:
        made.append(self)
        return note(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Cache, "update", noted)
        out = model(**given, **asked)
    return [out.get(name) for name in _CACHES if name in out] or made[:1]


def planned(model: Any, prompt: int, new: int) -> CacheBytes:
    cache = model_cache(model)
    return cache_bytes(shape_of(cache, model), ROWS, prompt, new)


@pytest.mark.parametrize(
    "name",
    shared(zoo.names(generates=True), lambda place, name: place % 6 == 0),
)
def test_planned_bytes_are_those_of_the_cache_of_any_model(name: str) -> None:
    model = zoo.build(name)
    given = zoo.inputs(name, rows=ROWS, tokens=9)
    caches = filled(model, given)
    prompt, new = given.get("input_ids", torch.empty(0, 0)).shape[1], 0
    if model.config.is_encoder_decoder:
        new = given["decoder_input_ids"].shape[1]
        prompt = prompt or caches[0].cross_attention_cache.layers[0].keys.shape[2]
    assert planned(model, prompt, new).total == pytest.approx(
        real_bytes(caches), rel=0.01
    )
    assert bool(model_cache(model).note) == (name in _DERIVED)


@pytest.mark.parametrize(
    "name", shared(sorted(SMALL), lambda place, name: place % 4 == 2)
)
def test_planned_bytes_are_those_of_the_cache_of_published_models(
    name: str, tmp_path: Path
) -> None:
    config = read_config(write(tmp_path, small(name)), False)
    torch.manual_seed(0)
    kind: Any = model_class_of(config, tmp_path, False)
    model = kind(config).eval()
    ids = torch.randint(8, 300, (ROWS, TOKENS))
    caches = filled(model, {"input_ids": ids})
    found = planned(model, TOKENS, 0)
    assert found.total == pytest.approx(real_bytes(caches), rel=0.01)
    assert found.total
    assert not model_cache(model).note


def test_equal_blocks_are_traced_once_and_counted_each() -> None:
    """Windows and shares of experts differ between blocks of one class."""
    model = zoo.build("gpt_oss")
    cache = model_cache(model)
    kept = [cache.kept[f"model.layers.{i}.self_attn"] for i in range(4)]
    assert [each.window for each in kept] == [4, None, 4, None]
    assert len({each.per_token for each in kept}) == 1


def test_latents_are_what_is_kept_and_keys_are_what_is_made_of_them() -> None:
    kept = model_cache(zoo.build("deepseek_v3")).kept["model.layers.2.self_attn"]
    heads, nope, rope, value, rank = 4, 12, 8, 12, 16
    assert kept.per_token == rank + rope
    assert kept.width == heads * (nope + rope + value) // 2
    # The product with all heads, and the keys that are put together of it.
    assert kept.expanded_per_token == heads * (nope + value) + heads * (nope + rope)
    assert kept.expanded_flops == 2 * rank * heads * (nope + value)


def test_towers_of_other_senses_keep_nothing_and_do_not_run_for_text() -> None:
    model = zoo.build("llava")
    cache = model_cache(model)
    names = [n for n, _ in model.named_modules() if n.endswith((".mlp", "self_attn"))]
    modules = [model.get_submodule(name) for name in names]
    sites = cache.put_into([SiteCost(name) for name in names], modules)
    for site in sites:
        assert site.runs_for_text == ("vision" not in site.name)
        assert bool(site.kv_per_token) == (
            "vision" not in site.name and site.name.endswith("self_attn")
        )


def test_a_model_is_left_as_it_was() -> None:
    """Its weights may be anywhere: they are not touched."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
        )
    )
    calls = []
    model.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    before = {name: id(p) for name, p in model.named_parameters()}
    assert model_cache(model).kept
    assert not calls
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert all("forward" not in vars(module) for module in model.modules())
    assert model.training


def test_what_cannot_be_traced_is_derived_and_said() -> None:
    model = zoo.build("llama")

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kw: Any) -> Any:
        raise ValueError("no meta here")

    attention = type(model.model.layers[0].self_attn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "forward", forward)
        cache = model_cache(model)
    assert "derived from the config" in cache.note
    assert "no meta here" in cache.note
    assert cache.kept["model.layers.2.self_attn"].per_token == 2 * 2 * 12
