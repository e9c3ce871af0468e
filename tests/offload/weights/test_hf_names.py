"""Every tensor of a transformers model lands where transformers itself puts it."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_loader import opened
from transformers import (
    PreTrainedModel,
    conversion_mapping,
    core_model_loading,
    initialization,
)
from transformers.conversion_mapping import (
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    PermuteForRope,
    Split,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

import zoo
from checkpoints import same_bits
from penstock.io.checkpoint.index import open_checkpoint
from penstock.io.codecs.computed import Computed
from penstock.io.errors import CheckpointError
from penstock.io.weights.recipe import Recipe
from penstock.offload.weights import hf, hf_names
from penstock.offload.weights.conversions import Places
from penstock.offload.weights.hf_names import make_recipes

pytestmark = pytest.mark.usefixtures("no_leaks")

CONVERTED = [case.name for case in zoo.ARCHITECTURES.values() if case.converted]
OTHERS = [
    "albert",  # one layer run four times
    "funnel",  # its pad row is zeroed after loading: the zoo stores zeros
    "gpt_neox",
    "gpt_oss",
    "granitemoe",
    "llama_biased",
    "mamba",
    "resnet",  # float buffers in the checkpoint
    "vit",
    "whisper",
    "xlnet",
    "zamba",  # one block in several places
]


def built(folder: Path, dtype: str) -> tuple[hf.Skeleton, dict[str, torch.Tensor]]:
    """The model without weights, and the tensors that its recipes make."""
    checkpoint = open_checkpoint(folder)
    skeleton = hf.build(checkpoint, dtype)
    with opened(checkpoint, list(skeleton.recipes.values())) as rig:
        return skeleton, rig.load()


def check_against(
    model: PreTrainedModel, skeleton: hf.Skeleton, made: Mapping[str, torch.Tensor]
) -> None:
    """Every tensor of `model` is made, tied to one that is, or initialised alike."""
    wanted = model.state_dict()
    assert set(made) == set(skeleton.recipes)
    assert {name for name in made if not same_bits(made[name], wanted[name])} == set()
    places = {id(skeleton.model.get_parameter_or_buffer(name)) for name in made}
    for name in wanted.keys() - made.keys():
        found = skeleton.model.get_parameter_or_buffer(name)
        assert id(found) in places or same_bits(found.detach(), wanted[name]), name


def is_computed(recipe: Recipe) -> bool:
    return any(isinstance(part.codec, Computed) for part in recipe.slices)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERTED + OTHERS)
def test_recipes_make_what_from_pretrained_loads(name: str, tmp_path: Path) -> None:
    zoo.save_checkpoint(name, tmp_path)
    for dtype in ["float32", "bfloat16"] if zoo.ARCHITECTURES[name].half else ["auto"]:
        skeleton, made = built(tmp_path, dtype)
        options = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
        check_against(zoo.load(name, tmp_path, **options), skeleton, made)
        functions = [r for r in skeleton.recipes.values() if is_computed(r)]
        assert functions == [], "merged experts are parts of a parameter"


def test_the_tenth_expert_comes_after_the_ninth(tmp_path: Path) -> None:
    config: Any = zoo.ARCHITECTURES["mixtral"].config()
    config.num_local_experts = 12
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    skeleton, made = built(tmp_path, "auto")
    loaded = transformers.MixtralForCausalLM.from_pretrained(tmp_path)
    check_against(loaded, skeleton, made)


def deep(num_layers: int, folder: Path) -> int:
    """Makes the recipes of a model of so many layers of 12 experts. Returns how often
    transformers' operations were run on meta."""
    config: Any = zoo.ARCHITECTURES["mixtral"].config()
    config.num_local_experts, config.num_hidden_layers = 12, num_layers
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    checkpoint = open_checkpoint(folder)
    model = hf.build(checkpoint, "auto").model
    places = Places(model)
    make_recipes(model, checkpoint, model.dtype, None, places)
    return places.num_traces


def test_equal_blocks_are_traced_once(tmp_path: Path) -> None:
    few, many = deep(1, tmp_path / "few"), deep(5, tmp_path / "many")
    assert few == many == 2, "the stacks of two projections, and of one"


def test_patterns_are_tried_once_for_names_that_differ_in_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    rename = core_model_loading.rename_source_key

    def recorded(name: str, renamings: Any, converters: Any, *rest: Any) -> Any:
        tried.append(len(renamings) + len(converters))
        return rename(name, renamings, converters, *rest)

    monkeypatch.setattr(hf_names, "rename_source_key", recorded)
    counts = []
    for layers in (2, 6):
        tried.clear()
        deep(layers, tmp_path / str(layers))
        counts.append(sum(tried))
    # Recipes are made twice, and a block has 36 weights of experts.
    assert counts[1] - counts[0] <= 4 * 2 * 36


@pytest.mark.parametrize(
    ("pattern", "sees_numbers"),
    [
        (r"\.experts\.*\.w1\.weight", False),
        (r"x_2\.", False),
        (r"\w1\.", True),
        (r"x\d1\.", True),
        (r"a|1", True),
        (r"layers\.(\d+)\.", False),
        (r"\.block_sparse_moe\.", False),
        (r"layers\.61\.", True),
        (r"mlp\.[0-4]\.", True),
        (r"x\d{2}", True),
    ],
)
def test_a_pattern_that_sees_numbers_is_tried_on_every_name(
    pattern: str, sees_numbers: bool
) -> None:
    assert hf_names._sees_numbers(WeightRenaming(pattern, "y0")) == sees_numbers


def test_each_name_becomes_what_transformers_makes_of_it(tmp_path: Path) -> None:
    """For names that share what is known of each other."""
    for name in CONVERTED + OTHERS:
        model = zoo.build(name)
        state = dict(model.state_dict())
        mapping = get_model_conversion_mapping(model)
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        names = hf_names._Names(model, state, None)
        saved = core_model_loading.revert_weight_conversion(model, state)
        numbers = [key.replace(".1.", f".{n}.") for key in saved for n in (7, 8, 23)]
        for key in [*saved, *numbers]:
            wanted = core_model_loading.rename_source_key(
                key, renamings, converters, model.base_model_prefix, state
            )
            if wanted[0] not in state and key in state:
                wanted = core_model_loading.rename_source_key(
                    key, [], [], model.base_model_prefix, state
                )
            assert names.of(key) == wanted, name


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_auto_keeps_the_dtype_of_the_checkpoint(
    stored: torch.dtype, tmp_path: Path
) -> None:
    zoo.save_checkpoint("qwen3_moe", tmp_path, dtype=stored)
    skeleton, made = built(tmp_path, "auto")
    assert skeleton.model.dtype == stored
    assert all(tensor.dtype == stored for tensor in made.values())
    check_against(zoo.load("qwen3_moe", tmp_path, dtype="auto"), skeleton, made)


def test_tensors_that_the_model_has_no_place_for_are_ignored(tmp_path: Path) -> None:
    """As transformers does it: a head loaded as its base model, and the opposite."""
    zoo.save_checkpoint("llama", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    skeleton, made = built(tmp_path, "auto")
    assert "lm_head.weight" not in made
    check_against(transformers.LlamaModel.from_pretrained(tmp_path), skeleton, made)


def test_the_head_that_a_base_model_lacks_is_said_and_cannot_be_used(
    tmp_path: Path,
) -> None:
    model = zoo.build("llama")
    model.model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    skeleton = hf.build(open_checkpoint(tmp_path), "auto")
    assert "lacks lm_head.weight: it can only embed" in skeleton.notes[0]
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight"):
        skeleton.model.lm_head(torch.zeros(1, skeleton.model.config.hidden_size))


def test_a_tied_head_needs_no_tensor_of_its_own(tmp_path: Path) -> None:
    zoo.save_checkpoint("llama_biased", tmp_path)
    skeleton, made = built(tmp_path, "auto")
    assert "lm_head.weight" not in made
    head = skeleton.model.get_parameter("lm_head.weight")
    assert head is skeleton.model.get_parameter("model.embed_tokens.weight")


# Conversions of every kind, on a model small enough to see through.


def by_pattern(
    sources: str | list[str], targets: str | list[str], *operations: ConversionOps
) -> WeightConverter:
    return WeightConverter(sources, targets, list(operations))


MLP, ATTENTION = "mlp.gate_proj", "self_attn.q_proj"
CONVERSIONS: dict[str, tuple[list[WeightConverter], bool]] = {
    # How it is stored, and whether views suffice.
    "cut_in_rows": (
        [
            by_pattern(
                "mlp.gate_up_proj",
                ["mlp.gate_proj", "mlp.up_proj"],
                Chunk(dim=0),
            )
        ],
        True,
    ),
    "cut_in_columns": (
        [
            by_pattern(
                "mlp.gate_up_proj",
                ["mlp.gate_proj", "mlp.up_proj"],
                Chunk(dim=1),
            )
        ],
        True,
    ),
    "cut_unevenly": (
        [
            by_pattern(
                "self_attn.qkv_proj.weight",
                [f"self_attn.{x}_proj.weight" for x in "qkv"],
                Split(dim=0),
            )
        ],
        True,
    ),
    "joined_in_rows": (
        [by_pattern(["mlp.down_a", "mlp.down_b"], "mlp.down_proj", Concatenate(dim=0))],
        True,
    ),
    "joined_in_columns": (
        [by_pattern(["mlp.down_a", "mlp.down_b"], "mlp.down_proj", Concatenate(dim=1))],
        True,
    ),
    "turned": ([by_pattern("mlp.down_t", "mlp.down_proj", Transpose(0, 1))], True),
    "turned_where_it_must_be": (
        [
            by_pattern(
                "mlp.down_proj.weight",
                "mlp.down_proj.weight",
                Transpose(0, 1, check_dims=True),
            )
        ],
        True,
    ),
    "turned_and_cut": (
        [
            by_pattern(
                "mlp.gate_up_t",
                ["mlp.gate_proj", "mlp.up_proj"],
                Transpose(0, 1),
                Chunk(dim=0),
            )
        ],
        True,
    ),
    "permuted_for_rope": (
        [by_pattern("self_attn.q_rope", ATTENTION, PermuteForRope())],
        False,
    ),
    "interleaved": ([by_pattern("mlp.gate_mixed", MLP, Interleave(dim=0))], False),
    "interleaved_and_cut": (
        [
            by_pattern(
                "mlp.gate_up_mixed",
                ["mlp.gate_proj", "mlp.up_proj"],
                Interleave(dim=0),
                Chunk(dim=0),
            )
        ],
        False,
    ),
}


@pytest.fixture
def register() -> Iterator[Callable[[list[WeightConverter]], None]]:
    """Registers conversions of LlamaForCausalLM with transformers for one test."""
    name = "LlamaForCausalLM"
    get_model_conversion_mapping(zoo.build("llama"))  # fills the cache
    cache = conversion_mapping._checkpoint_conversion_mapping_cache
    assert cache is not None
    assert name not in cache

    def act(conversions: list[WeightConverter]) -> None:
        register_checkpoint_conversion_mapping(name, copy.deepcopy(conversions))

    yield act
    cache.pop(name, None)
    conversion_mapping.USER_REGISTERED_MAPPINGS.discard(name)


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_a_conversion_lands_as_transformers_lands_it(
    kind: str,
    register: Callable[[list[WeightConverter]], None],
    tmp_path: Path,
) -> None:
    conversions, is_view = CONVERSIONS[kind]
    model = zoo.build("llama")
    register(conversions)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    if kind != "turned_where_it_must_be":  # its names stay as they are
        stored = set(open_checkpoint(tmp_path).entries)
        assert stored != set(model.state_dict()), "stored as the model has it"
    for dtype in (torch.float32, torch.bfloat16):
        skeleton, made = built(tmp_path, str(dtype).removeprefix("torch."))
        assert same_bits(
            made["model.layers.0.mlp.gate_proj.weight"],
            model.state_dict()["model.layers.0.mlp.gate_proj.weight"].to(dtype),
        )
        loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        check_against(loaded, skeleton, made)
        functions = [r for r in skeleton.recipes.values() if is_computed(r)]
        assert bool(functions) != is_view


def test_a_stored_tensor_that_was_turned_already_is_not_turned_again(
    register: Callable[[list[WeightConverter]], None], tmp_path: Path
) -> None:
    model = zoo.build("llama")
    tensors = model.state_dict()
    for name in tensors:
        if "down_proj" in name:
            tensors[name] = tensors[name].t().contiguous()
    model.save_pretrained(tmp_path, state_dict=tensors)
    register(CONVERSIONS["turned_where_it_must_be"][0])
    skeleton, made = built(tmp_path, "auto")
    name = "model.layers.1.mlp.down_proj.weight"
    assert same_bits(made[name], model.state_dict()[name])
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    check_against(loaded, skeleton, made)


def test_a_shape_that_is_not_the_models_is_an_error(tmp_path: Path) -> None:
    zoo.save_checkpoint("llama", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "intermediate_size": 80}))
    with pytest.raises(CheckpointError, match="of another model") as caught:
        hf.build(open_checkpoint(tmp_path), "auto")
    assert "mlp" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


# Private calls of transformers: each exists, takes what we give, does what we need.

MODEL = PreTrainedModel
_CONTEXT = ("dtype", "is_quantized", "_is_ds_init_called", "allow_all_kernels")
CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "get_model_conversion_mapping": (get_model_conversion_mapping, (1,), {}),
    "rename_source_key": (
        core_model_loading.rename_source_key,
        ("a", [], [], "model", {}),
        {},
    ),
    "dot_natural_key": (core_model_loading.dot_natural_key, ("a.1",), {}),
    "build_glob_alternation": (core_model_loading.build_glob_alternation, (["a"],), {}),
    "reverse_transform": (WeightConverter.reverse_transform, (None,), {}),
    "_get_dtype_plan": (MODEL._get_dtype_plan, (None, torch.float32), {}),
    "get_init_context": (
        MODEL.get_init_context,
        (),
        {
            key: None
            for key in _CONTEXT
            if key in inspect.signature(MODEL.get_init_context).parameters
        },
    ),
    "mark_tied_weights_as_initialized": (
        MODEL.mark_tied_weights_as_initialized,
        (None, None),
        {},
    ),
    "_move_missing_keys_from_meta_to_device": (
        MODEL._move_missing_keys_from_meta_to_device,
        (None, [], None, None, None),
        {},
    ),
    "_initialize_missing_keys": (MODEL._initialize_missing_keys, (None, False), {}),
    "tie_weights": (
        MODEL.tie_weights,
        (None,),
        {"missing_keys": set(), "recompute_mapping": False},
    ),
    "_adjust_missing_and_unexpected_keys": (
        MODEL._adjust_missing_and_unexpected_keys,
        (None, None),
        {},
    ),
    "get_parameter_or_buffer": (MODEL.get_parameter_or_buffer, (None, "a"), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_private_call_takes_what_it_is_given(name: str) -> None:
    call, args, kwargs = CALLS[name]
    inspect.signature(call).bind(*args, **kwargs)  # TypeError says what changed


def subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    for found in kind.__subclasses__():
        yield found
        yield from subclasses(found)


@pytest.mark.parametrize(
    "operation",
    [
        c
        for c in subclasses(ConversionOps)
        if c.__module__ == core_model_loading.__name__
    ],
    ids=lambda c: c.__name__,
)
def test_every_operation_takes_what_it_is_given(operation: type[Any]) -> None:
    inspect.signature(operation.convert).bind(
        None,
        {},
        source_patterns=[],
        target_patterns=[],
        full_layer_name="a",
        model=None,
        config=None,
        missing_keys=None,
    )


def test_the_loading_info_has_the_fields_that_are_read_and_written() -> None:
    info = hf._loading_info({"a", "b"})
    assert info.missing_keys == {"a", "b"}
    assert set(info.missing_and_mismatched()) == {"a", "b"}


def test_initialised_tensors_are_known_by_their_mark() -> None:
    """`_is_hf_initialized` is what keeps transformers from filling them again."""
    layer = torch.nn.Linear(3, 3)
    for parameter in layer.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    before = layer.weight.detach().clone()
    model = zoo.build("llama")
    with torch.no_grad():
        initialization.normal_(layer.weight)
    model._init_weights(layer)
    assert torch.equal(layer.weight, before)


def test_names_are_sorted_by_their_numbers() -> None:
    names = ["a.10.w", "a.2.w", "a.1.w"]
    found = sorted(names, key=core_model_loading.dot_natural_key)
    assert found == ["a.1.w", "a.2.w", "a.10.w"]


def test_a_rename_gives_the_name_and_the_pattern_of_its_converter() -> None:
    renamings = [WeightRenaming("block", "layer")]
    converters = [
        by_pattern("experts.*.w1", "experts.gate", MergeModulelist(dim=0)),
    ]
    state = {"model.layer.experts.gate": 1, "model.layer.norm": 1}
    for stored, expected in {
        "block.experts.3.w1": ("model.layer.experts.gate", "experts.*.w1"),
        "model.block.norm": ("model.layer.norm", None),
        "block.norm": ("model.layer.norm", None),
    }.items():
        found = core_model_loading.rename_source_key(
            stored, renamings, converters, "model", state
        )
        assert found == expected


def test_a_plan_of_dtypes_is_searched_by_group() -> None:
    search, groups, _ = core_model_loading.build_glob_alternation(["a.*.b", "norm"])
    match = search.search("model.norm.weight")
    assert match is not None
    assert match.lastgroup is not None
    assert groups[match.lastgroup] == "norm"


def test_a_recipe_of_a_function_names_all_that_it_reads(
    register: Callable[[list[WeightConverter]], None], tmp_path: Path
) -> None:
    model = zoo.build("llama")
    register(CONVERSIONS["permuted_for_rope"][0])
    model.save_pretrained(tmp_path)
    recipes: Mapping[str, Recipe] = hf.build(open_checkpoint(tmp_path), "auto").recipes
    recipe = recipes["model.layers.2.self_attn.q_proj.weight"]
    assert [entry.name for entry in recipe.entries] == [
        "model.layers.2.self_attn.q_rope.weight"
    ]
    assert recipe.stored_bytes == recipe.nbytes
