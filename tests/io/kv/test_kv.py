"""Keys and values in tiers: nobody can tell from what is generated, what is written is
what is new, and all of it is gone when it is over."""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_device import GPU, NAME
from transformers import DynamicCache

import penstock
import zoo
from nets import same
from penstock import Policy
from penstock.io.errors import ClosedError, DoesNotFitError, PenstockError
from penstock.io.kv import staging as kv_staging
from penstock.io.kv.pages import PAGE_BYTES
from penstock.io.kv.staging import Staging
from penstock.offload.kv.cache import replace_layers
from penstock.offload.model import engine_of
from shares import in_turns, shared

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture(autouse=True)
def few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models' keys and values would all stay staged."""
    monkeypatch.setattr(kv_staging, "FEW_BYTES", 0)


TIERS = ["device", "host", "link", "disk"]
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
FEW = ["llama", "gemma3_text", "t5"]
MORE = ["gpt2", "bloom", "mistral", "mixtral", "jamba", "mamba", "qwen3_next"]


def loaded(folder: Path, kv: dict[str, Any], **policy: Any) -> Any:
    """With the tier `link`, host memory that has to be copied."""
    policy.setdefault("io", {"cache": folder / "cache"})
    if kv["tier"] == "link":
        kv, policy["links"] = {**kv, "tier": "host"}, {"host": {"bandwidth": "10GB"}}
    settings = {"device_memory": "2MiB", "resident_below": 1, "kv": kv, **policy}
    return penstock.load(folder, Policy(**settings))


def expected_of(name: str, folder: Path, items: list[Any], **how: Any) -> list[Any]:
    zoo.save_checkpoint(name, folder)
    model = zoo.load(name, folder)
    return [model.generate(**item, **{**GREEDY, **how}) for item in items]


def swept(model: Any, items: list[Any], **how: Any) -> list[Any]:
    with penstock.sweep(model) as sweep:
        return sweep.map(
            lambda item: model.generate(**item, **{**GREEDY, **how}), items
        )


def assert_nothing_is_held(model: Any) -> None:
    assert not any(penstock.statistics(model).kv.bytes_held.values())


def batches_of(name: str, num: int = 4, **how: Any) -> list[Any]:
    return [zoo.inputs(name, seed=seed, **how) for seed in range(num)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tier"), [*in_turns(FEW, TIERS, 2), *in_turns(MORE, TIERS)]
)
def test_what_is_generated_is_bit_identical(
    name: str, tier: str, tmp_path: Path
) -> None:
    items = batches_of(name)
    expected = expected_of(name, tmp_path, items)
    with loaded(tmp_path, {"tier": tier}) as model:
        assert same(swept(model, items), expected)
        assert torch.equal(model.generate(**items[0], **GREEDY), expected[0])
        kv = penstock.statistics(model).kv
        assert (kv.num_appended > 0) == (name != "mamba")
        assert_nothing_is_held(model)


@pytest.mark.whole
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", zoo.names(generates=True))
def test_every_model_has_the_same_bits_on_every_tier(
    name: str, tier: str, tmp_path: Path
) -> None:
    """Tokens, and the logits that they were taken from."""
    if name == "rwkv_rescaled":
        pytest.skip("it writes to its weights, which is refused")
    how = {"return_dict_in_generate": True, "output_logits": True}
    items = batches_of(name, 3)
    expected = expected_of(name, tmp_path, items, **how)
    with loaded(tmp_path, {"tier": tier}) as model:
        found = swept(model, items, **how)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.sequences, theirs.sequences)
        assert same(list(ours.logits), list(theirs.logits))


@pytest.mark.parametrize("tier", TIERS)
def test_ragged_prompts_may_stop_early(tier: str, tmp_path: Path) -> None:
    items = batches_of("llama", ragged=True) + batches_of("llama", rows=1, tokens=5)
    zoo.save_checkpoint("llama", tmp_path)
    alone = zoo.load("llama", tmp_path)
    longest = alone.generate(**items[0], **GREEDY)
    end = int(longest[0, -3])  # so some stop there, and one of a batch goes on
    expected = [alone.generate(**i, **GREEDY, eos_token_id=end) for i in items]
    assert expected[0].shape == longest.shape
    assert not torch.equal(expected[0], longest)
    with loaded(tmp_path, {"tier": tier}) as model:
        assert same(swept(model, items, eos_token_id=end), expected)
        assert_nothing_is_held(model)


HOW = {
    "beams": {"num_beams": 3},
    "several": {"num_return_sequences": 2, "do_sample": True, "seed": 7},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "chunked prefill": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize(
    ("name", "kind", "tier"),
    shared(
        [(n, kind, t) for n in ("llama", "gemma3_text") for kind in HOW for t in TIERS],
        lambda place, _: place % 4 == (place // 4 + place // 16) % 4,
    ),
)
def test_every_way_to_generate_is_bit_identical(
    name: str, kind: str, tier: str, tmp_path: Path
) -> None:
    rows = 1 if kind == "prompt lookup" else 2
    items = batches_of(name, 3, rows=rows, tokens=12)
    how = dict(HOW[kind])
    seed = how.pop("seed", None)
    zoo.save_checkpoint(name, tmp_path)
    alone = zoo.load(name, tmp_path)
    expected = []
    for index, item in enumerate(items):
        torch.manual_seed((seed or 0) + index)
        expected.append(alone.generate(**item, **{**GREEDY, **how}))
    with loaded(tmp_path, {"tier": tier}) as model:
        with penstock.sweep(model, seed=seed or 0) as sweep:
            found = sweep.map(
                lambda item: model.generate(**item, **{**GREEDY, **how}), items
            )
        assert same(found, expected)
        assert_nothing_is_held(model)


@pytest.mark.parametrize("tier", TIERS)
def test_of_what_slides_by_only_the_window_is_kept(tier: str, tmp_path: Path) -> None:
    items = batches_of("mistral", 2, tokens=40)
    expected = expected_of("mistral", tmp_path, items, max_new_tokens=40)
    with loaded(tmp_path, {"tier": tier}) as model:
        assert same(swept(model, items, max_new_tokens=40), expected)
        kv = penstock.statistics(model).kv
        window = model.config.sliding_window
        assert window < 40, "or there is nothing to see"
        row = row_bytes(model)
        buffers = 2 * model.config.num_hidden_layers
        page = PAGE_BYTES if tier == "disk" else 0
        most = buffers * (2 * window * row + page)
        assert max(kv.peak_bytes_held.values()) <= most
        if tier != "disk":  # where pages are larger than all that is written
            assert 0 < kv.bytes_moved <= max(kv.bytes_written.values())


# What it costs.


def row_bytes(model: Any, rows: int = 2) -> int:
    """Keys and values of one token in one layer."""
    config = model.config
    heads = config.num_key_value_heads
    width = getattr(config, "head_dim", None)
    width = width or config.hidden_size // config.num_attention_heads
    return 2 * int(heads) * int(width) * 4 * rows


def test_each_token_is_written_once(tmp_path: Path) -> None:
    items = batches_of("llama", 3, tokens=9)
    expected = expected_of("llama", tmp_path, items)
    with loaded(tmp_path, {"tier": "host"}) as model:
        assert same(swept(model, items), expected)
        kv = penstock.statistics(model).kv
        layers = model.config.num_hidden_layers
        tokens = 3 * (9 + 4)  # the last one is generated, but never read
        assert kv.num_appended == tokens * 2 * layers
        assert kv.bytes_written == {"host": tokens * layers * row_bytes(model)}
        assert kv.bytes_moved == 0
        most = 3 * (9 + 4) * layers * row_bytes(model)
        assert kv.peak_bytes_held["host"] == most


@pytest.mark.parametrize("num", [1, 4])
def test_of_what_is_elsewhere_the_whole_prefix_is_read_at_each_step(
    num: int, tmp_path: Path
) -> None:
    items = batches_of("llama", num, tokens=9)
    expected = expected_of("llama", tmp_path, items)
    with loaded(tmp_path, {"tier": "link", "staging_memory": "1KiB"}) as model:
        assert same(swept(model, items), expected)
        kv = penstock.statistics(model).kv
        each = num * model.config.num_hidden_layers * row_bytes(model)
        assert kv.bytes_written == {"host": (9 + 4) * each}
        assert kv.bytes_read == {"host": (9 + 10 + 11 + 12) * each}
        assert kv.bytes_moved == 0


@pytest.mark.parametrize("tier", ["link", "disk"])
def test_in_a_sweep_it_is_brought_before_it_is_needed(
    tier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = batches_of("llama", 5)
    expected = expected_of("llama", tmp_path, items)
    lent = Counter[bool]()
    lend = Staging.lend

    def watch(self: Staging, *args: Any, ahead: bool) -> Any:
        found = lend(self, *args, ahead=ahead)
        lent[ahead] += found is not None
        return found

    monkeypatch.setattr(Staging, "lend", watch)
    with loaded(tmp_path, {"tier": tier}) as model:
        assert same(swept(model, items), expected)
        steps, layers = 3, model.config.num_hidden_layers
        # Who follows whom is learnt; who goes on no more is not known before.
        assert lent[False] <= layers
        assert sum(lent.values()) <= 5 * (steps + 1) * layers + 5


def test_waiting_for_keys_and_values_is_counted(tmp_path: Path) -> None:
    items = batches_of("llama", 2)
    expected_of("llama", tmp_path, items)
    slow = {"bandwidth": "200kB"}
    with loaded(tmp_path, {"tier": "host"}, links={"host": slow}) as model:
        swept(model, items)
        kv = penstock.statistics(model).kv
        link = sum(kv.bytes_read.values()) / 200e3
        assert kv.wait_seconds > link / 2
    with loaded(tmp_path, {"tier": "device"}) as model:
        swept(model, items)
        assert penstock.statistics(model).kv.wait_seconds == 0


def test_what_is_staged_still_is_not_read_again(tmp_path: Path) -> None:
    items = batches_of("llama", 1, tokens=9)
    expected = expected_of("llama", tmp_path, items)
    with loaded(tmp_path, {"tier": "link", "staging_memory": "1MiB"}) as model:
        assert same(swept(model, items), expected)
        kv = penstock.statistics(model).kv
        assert 0 < kv.bytes_read["host"] < kv.bytes_written["host"]


def test_by_default_the_cache_stays_as_it_is(tmp_path: Path) -> None:
    items = batches_of("llama", 2)
    expected = expected_of("llama", tmp_path, items)
    zoo_policy = {"device_memory": "2MiB", "resident_below": 1}
    with penstock.load(tmp_path, Policy(**zoo_policy)) as model:
        assert same(swept(model, items), expected)
        assert penstock.statistics(model).kv.num_appended == 0


def test_a_cache_that_is_passed_is_left_alone(tmp_path: Path) -> None:
    items = batches_of("llama", 3)
    expected = expected_of("llama", tmp_path, items)
    with loaded(tmp_path, {"tier": "host"}) as model:
        caches = [DynamicCache(config=model.config) for _ in items]
        with penstock.sweep(model) as sweep:
            found = sweep.map(
                lambda pair: model.generate(
                    **pair[0], **GREEDY, past_key_values=pair[1]
                ),
                list(zip(items, caches, strict=True)),
            )
        assert same(found, expected)
        assert penstock.statistics(model).kv.num_appended == 0
        assert all(cache.get_seq_length() == 13 for cache in caches)


def test_a_wrapped_model_is_as_it_was_when_it_is_unwrapped(tmp_path: Path) -> None:
    model: Any = zoo.build("llama")
    item = zoo.inputs("llama")
    expected = model.generate(**item, **GREEDY)
    before = set(model.__dict__)
    io = {"cache": tmp_path}
    policy = Policy(device_memory="2MiB", resident_below=1, kv={"tier": "host"}, io=io)
    with penstock.wrap(model, policy):
        assert same(swept(model, [item, item]), [expected, expected])
        assert penstock.statistics(model).kv.num_appended > 0
    assert set(model.__dict__) == before
    assert torch.equal(model.generate(**item, **GREEDY), expected)


# When it is over.


class Held(RuntimeError):
    pass


@pytest.mark.parametrize("tier", TIERS)
def test_what_ends_is_freed_before_the_next_one_starts(
    tier: str, tmp_path: Path
) -> None:
    zoo.save_checkpoint("llama", tmp_path)
    gc.disable()
    try:
        with loaded(tmp_path, {"tier": tier}) as model, penstock.sweep(model) as sweep:
            for _ in sweep.run(
                lambda item: model.generate(**item, **GREEDY), batches_of("llama", 3)
            ):
                pass
            assert_nothing_is_held(model)
            model.generate(**zoo.inputs("llama"), **GREEDY)
            assert_nothing_is_held(model)
    finally:
        gc.enable()


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("error", [Held, KeyboardInterrupt])
def test_what_fails_is_freed_though_its_error_is_kept(
    error: type[BaseException], tier: str, tmp_path: Path
) -> None:
    zoo.save_checkpoint("llama", tmp_path)
    items = batches_of("llama", 4)
    lengths: list[int] = []

    def fn(item: Any) -> Any:
        def stop(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            lengths.append(ids.shape[1])
            if len(lengths) > 9:
                raise error("no more")
            return torch.zeros(ids.shape[0], dtype=torch.bool)

        return model.generate(**item, **GREEDY, stopping_criteria=[stop])

    with loaded(tmp_path, {"tier": tier}) as model:
        with penstock.sweep(model) as sweep, pytest.raises(error) as caught:
            sweep.map(fn, items)
        assert caught.value.__traceback__ is not None
        assert_nothing_is_held(model)
        model.generate(**items[0], **GREEDY)
        assert_nothing_is_held(model)


def test_a_plain_call_between_outcomes_has_a_cache_of_its_own(tmp_path: Path) -> None:
    items = batches_of("llama", 3)
    expected = expected_of("llama", tmp_path, items)

    def fn(item: Any) -> Any:
        found = model.generate(**item, **GREEDY)
        if item is items[0]:
            raise Held
        return found

    kept = {**GREEDY, "return_dict_in_generate": True}
    with loaded(tmp_path, {"tier": "host"}) as model, penstock.sweep(model) as sweep:
        caches = []
        for outcome in sweep.run(fn, items):
            assert (outcome.error is None) == (outcome.index > 0)
            caches.append(model.generate(**items[0], **kept).past_key_values)
        assert all(cache.layers[0].keys.shape[2] == 13 for cache in caches)
        assert same(swept(model, items), expected)


@pytest.mark.parametrize("tier", TIERS)
def test_a_cache_that_is_returned_lives_until_the_model_is_closed(
    tier: str, tmp_path: Path
) -> None:
    items = batches_of("llama", 2)
    zoo.save_checkpoint("llama", tmp_path)
    alone = zoo.load("llama", tmp_path)
    how = {**GREEDY, "return_dict_in_generate": True}
    expected = [alone.generate(**item, **how).past_key_values for item in items]
    with loaded(tmp_path, {"tier": tier}) as model:
        found = [o.past_key_values for o in swept(model, items, **how)]
        for one, other in zip(expected, found, strict=True):
            for (k1, v1, _), (k2, v2, _) in zip(one, other, strict=True):
                assert torch.equal(k1, k2)
                assert torch.equal(v1, v2)
        assert any(penstock.statistics(model).kv.bytes_held.values())
        cache = found[0]
    with pytest.raises(ClosedError, match="ended"):
        _ = cache.layers[0].keys
    assert cache.get_seq_length() == 13


def test_activations_may_leave_the_device_too(tmp_path: Path) -> None:
    items = batches_of("llama", 4)
    expected = expected_of("llama", tmp_path, items)
    with loaded(tmp_path, {"tier": "link"}, activations="host") as model:
        assert same(swept(model, items), expected)
        assert_nothing_is_held(model)


@pytest.mark.slow
@pytest.mark.parametrize("device", [pytest.param(NAME, marks=GPU)])
@pytest.mark.parametrize(
    "kv",
    [
        {"tier": "device"},
        {"tier": "host"},
        {"tier": "host", "attention": "host"},
        {"tier": "disk"},
    ],
    ids=lambda kv: "-".join(kv.values()),
)
@pytest.mark.parametrize("name", FEW)
def test_on_a_gpu_the_same_tokens_are_generated(
    name: str, kv: dict[str, Any], device: str, tmp_path: Path
) -> None:
    items = [
        {key: tensor.to(device) for key, tensor in item.items()}
        for item in batches_of(name)
    ]
    zoo.save_checkpoint(name, tmp_path)
    with loaded(tmp_path, {"tier": "auto"}, device=device) as model:
        expected = swept(model, items)
    with loaded(tmp_path, kv, device=device) as model:
        assert same(swept(model, items), expected)
        assert torch.equal(model.generate(**items[0], **GREEDY), expected[0])
        assert_nothing_is_held(model)


# When there is no room.


def test_what_does_not_fit_goes_to_the_next_tier(tmp_path: Path) -> None:
    items = batches_of("llama", 3)
    expected = expected_of("llama", tmp_path, items)
    with loaded(tmp_path, {"tier": "device", "limits": {"device": "8KiB"}}) as model:
        assert same(swept(model, items), expected)
        found = penstock.statistics(model)
    assert found.kv.bytes_written["device"] > 0
    assert found.kv.bytes_written["host"] > 0
    assert 0 < found.kv.peak_bytes_held["device"] <= 8 << 10
    assert [note for note in found.fallbacks if "no more room in device" in note]


def test_when_no_tier_has_room_the_error_says_what_would_help(tmp_path: Path) -> None:
    items = batches_of("llama", 3)
    zoo.save_checkpoint("llama", tmp_path)
    limits = {"host": "1KiB", "disk": "1KiB"}
    with loaded(tmp_path, {"tier": "host", "limits": limits}) as model:
        with pytest.raises(DoesNotFitError, match=r"of 1024 are taken.*kv\.limits"):
            swept(model, items)
        assert_nothing_is_held(model)


def test_what_is_not_on_the_device_is_not_admitted_as_activations(
    tmp_path: Path,
) -> None:
    items = batches_of("llama", 8, tokens=64)
    zoo.save_checkpoint("llama", tmp_path)
    most = {}
    for tier in ("device", "host"):
        how = {"activation_memory": "400KiB"}
        with (
            loaded(tmp_path, {"tier": tier}, **how) as model,
            penstock.sweep(model) as sweep,
        ):
            sweep.map(lambda item: model.generate(**item, **GREEDY), items)
            most[tier] = sweep.statistics().max_in_flight
    assert most["device"] < most["host"]


# What the model's code may do with the cache.


def update(caches: list[Any], generator: torch.Generator, num: int, rows: int) -> None:
    """The same tokens to all `caches`, which must answer the same."""
    for index in range(len(caches[0].layers)):
        keys = torch.randn(rows, 2, num, 8, generator=generator)
        values = torch.randn(rows, 2, num, 8, generator=generator)
        found = [cache.update(keys, values, index) for cache in caches]
        assert all(same(found[0], other) for other in found)


@pytest.fixture(params=["llama", "gemma3_text"])
def caches(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[Any]]:
    """One as transformers makes it, one of each tier."""
    config = zoo.ARCHITECTURES[request.param].config()
    zoo.save_checkpoint("llama", tmp_path)
    made: list[Any] = [DynamicCache(config=config)]
    with contextlib.ExitStack() as opened:
        for tier in TIERS:
            model = opened.enter_context(loaded(tmp_path, {"tier": tier}))
            tiers = engine_of(model)._kv
            assert tiers is not None
            made.append(DynamicCache(config=config))
            replace_layers(made[-1], tiers.store, 32)
        yield made


ACTS: list[Callable[[Any], None]] = [
    lambda cache: cache.crop(-1),
    lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    lambda cache: cache.batch_repeat_interleave(3),
    lambda cache: cache.batch_select_indices(torch.tensor([5, 0, 2])),
    lambda cache: cache.crop(0),
    lambda cache: cache.batch_select_indices(torch.tensor([0, 2])),
    lambda cache: cache.crop(-2),
]


def test_a_cache_does_what_transformers_does(caches: list[Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = caches[0]
    assert [cache.get_seq_length() for cache in caches] == [0] * len(caches)
    update(caches, generator, 3, 2)
    for number, act in enumerate(ACTS):
        if number in (4, 6) and plain.is_sliding[0]:
            continue  # what slid away cannot be cropped back
        for cache in caches:
            act(cache)
        update(caches, generator, 1, plain.layers[0].keys.shape[0])
        for cache in caches:
            assert cache.get_seq_length() == plain.get_seq_length()
            assert cache.get_max_length() == plain.get_max_length()
            assert cache.is_croppable == plain.is_croppable
            assert not cache.is_compileable
            for index, layer in enumerate(plain.layers):
                sizes = cache.get_mask_sizes(1, index)
                assert sizes == plain.get_mask_sizes(1, index)
                assert torch.equal(cache.layers[index].keys, layer.keys)
                assert torch.equal(cache.layers[index].values, layer.values)
    for cache in caches:
        cache.reset()
        assert cache.get_seq_length() == 0
    update(caches, generator, 40, 1)  # more than was said


def test_past_recording_lets_a_sliding_window_go_back(caches: list[Any]) -> None:
    for cache in caches:
        cache.activate_past_recording()
    generator = torch.Generator().manual_seed(0)
    for num in (12, 3, 1, 2):
        update(caches, generator, num, 2)
        for cache in caches:
            cache.crop(-1)
    assert [cache.get_seq_length() for cache in caches] == [14] * len(caches)


def test_what_slid_away_cannot_be_cropped_back(caches: list[Any]) -> None:
    update(caches, torch.Generator(), 40, 1)
    if caches[0].is_sliding[0]:
        for cache in caches[1:]:
            with pytest.raises(PenstockError, match="activate_past_recording"):
                cache.crop(-1)


def test_keys_are_not_replaced(caches: list[Any]) -> None:
    for cache in caches[1:]:
        with pytest.raises(PenstockError, match="appended"):
            cache.layers[0].keys = torch.zeros(1, 2, 3, 4)


def test_transformers_makes_caches_as_the_adapter_expects(tmp_path: Path) -> None:
    """The private calls that offload/kv/cache.py relies on."""
    import inspect

    from transformers import cache_utils
    from transformers.generation.utils import GenerationMixin

    prepare = inspect.signature(GenerationMixin._prepare_cache_for_generation)
    names = list(prepare.parameters)
    assert names[1:3] == ["generation_config", "model_kwargs"]
    assert names[5] == "max_cache_length"
    model = zoo.build("gemma3_text")
    kwargs: dict[str, Any] = {}
    config = model.generation_config
    config.is_assistant = False
    model._prepare_cache_for_generation(config, kwargs, None, 1, 20)
    made: Any = kwargs["past_key_values"]
    assert made is not None
    assert type(made) is cache_utils.DynamicCache
    assert isinstance(made.layers, list)
    assert made.layer_class_to_replicate is None
    assert {type(layer) for layer in made.layers} == {
        cache_utils.DynamicLayer,
        cache_utils.DynamicSlidingWindowLayer,
    }
    sliding: Any = made.layers[0]
    assert sliding.sliding_window == model.config.sliding_window
    assert cache_utils.DynamicCache().layer_class_to_replicate is (
        cache_utils.DynamicLayer
    )
