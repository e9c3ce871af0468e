"""Rows that nothing can be made of fail alone, and rows become what they would become
alone: whatever they ask for, and whoever is beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
)

import penstock
from common.id_tokenizer import Numbers
from penstock import Policy
from penstock.io.errors import UsageError
from penstock.offload.files.json_rows import SAMPLING, UNUSED, refused
from penstock.offload.generation.decoding_options import way_of
from penstock.offload.generation.row_sampling import RowSampling, row_sampling
from penstock.offload.rows.chat import tokenize_chat
from penstock.offload.rows.limits import Limits, context_length
from penstock.offload.rows.row_error import RowError

pytestmark = pytest.mark.usefixtures("no_leaks")

NUM_IDS = 40
BROKEN = 33
"""Its embedding is NaN."""
# Several lengths, and repetitions, which processors that look at ids find.
PROMPTS = ["1 2 3 1 2 3 1", "5 6", "7 8 9 10 11 12 13 14 15", "9", "2 4 2 4 2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose greedy completions are all different."""
    path: Path = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=NUM_IDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        model.lm_head.weight[BROKEN] = 0
    model.save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"][BROKEN] = float("nan")
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Any]:
    policy = Policy(device_memory="60KiB", resident_below=10, coalesce="off")
    with penstock.load(folder, policy) as found:
        generated(found, ["1"])  # opens its files: no test leaves these behind
        yield found


@pytest.fixture(scope="module")
def resident(folder: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(folder).train(False)


def generated(model: Any, rows: list[Any], **options: Any) -> list[dict[str, Any]]:
    """The results for `rows`, which are prompts or rows."""
    made = [row if isinstance(row, dict) else {"prompt": row} for row in rows]
    values = {"max_new_tokens": 6, "tokenizer": Numbers(), **options}
    return list(penstock.generate(model, made, **values))


def alone(resident: Any, prompt: str, **options: Any) -> str:
    ids = torch.tensor([[int(token) for token in prompt.split()]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    with torch.inference_mode():
        found = resident.generate(ids, **options)
    return " ".join(map(str, found[0, ids.shape[1] :].tolist()))


def tasks(model: Any, texts: list[str]) -> dict[str, list[dict[str, Any]]]:
    """The results of each task for `texts`, by the name of the task."""
    tokenizer = Numbers()
    rows = [{"text": text} for text in texts]
    labels = [" 3", " 4 5"]
    return {
        "score": list(penstock.score(model, rows, tokenizer=tokenizer)),
        "embed": list(penstock.embed(model, rows, tokenizer=tokenizer)),
        "classify": list(
            penstock.classify(model, rows, labels=labels, tokenizer=tokenizer)
        ),
        "generate": generated(model, texts),
    }


GOOD = "1 2 3"


def test_a_token_that_the_model_has_not_is_that_rows_error(model: Any) -> None:
    for name, found in tasks(model, [GOOD, f"1 {NUM_IDS} 2", GOOD]).items():
        assert f"has token {NUM_IDS}" in found[1]["error"], name
        assert "error" not in found[0] | found[2], name


@pytest.mark.parametrize("key", ["text", "seed", "temperature"])
def test_an_error_of_a_row_is_short_and_can_be_printed(key: str, model: Any) -> None:
    row: dict[str, Any] = {"text": "1 2", key: "\x1b\ud800" * 9_999}
    if key == "text":
        row[key] = [row[key], 5]
    row |= dict.fromkeys(map(str, range(9_999)), 0)
    for task in (
        generated(model, [row]),
        penstock.score(model, [row], tokenizer=Numbers()),
        penstock.embed(model, [row], tokenizer=Numbers()),
    ):
        for result in task:
            assert len(result["error"]) < 2_000
            assert result["error"].isprintable()


def test_logits_that_are_no_numbers_are_that_rows_error(model: Any) -> None:
    for name, found in tasks(model, [GOOD, f"1 {BROKEN} 2", GOOD]).items():
        assert "overflow" in found[1]["error"], name
        assert "error" not in found[0] | found[2], name
    for options in ({"num_beams": 3}, {"temperature": 1.0}):
        found = generated(model, [GOOD, f"1 {BROKEN} 2", GOOD], **options)
        assert "not finite" in found[1]["error"]
        assert "error" not in found[0] | found[2]


@pytest.mark.parametrize("bad", [-torch.inf, torch.inf])
def test_infinite_logits_are_that_rows_error(bad: float, model: Any) -> None:
    """Minus infinity for all that could come next, or infinity for something."""

    def spoil(head: Any, arguments: Any, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        logits[1, :, (None if bad < 0 else slice(3, 4)) or slice(None)] = bad
        return logits

    handle = model.lm_head.register_forward_hook(spoil)
    try:
        found = generated(model, [GOOD, "4 5 6", "7 8 9"])
    finally:
        handle.remove()
    assert "not finite" in found[1]["error"]
    assert "error" not in found[0] | found[2]


def test_rows_that_fail_together_are_run_one_by_one(model: Any) -> None:
    def fail(embedding: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        if (arguments[0] == 21).any():
            raise ValueError("not this one")

    before = tasks(model, [GOOD, "4 5 6"])
    table = model.get_input_embeddings()
    handle = table.register_forward_pre_hook(fail)
    try:
        after = tasks(model, [GOOD, "1 21 2", "4 5 6"])
    finally:
        handle.remove()
    for name, (first, bad, last) in after.items():
        assert "ValueError: not this one" in bad["error"], name
        for found, expected in zip((first, last), before[name], strict=True):
            assert found.keys() == expected.keys(), name
            assert found.get("completion") == expected.get("completion")


class PadsBeyond(Numbers):
    pad_token_id = NUM_IDS


def test_padding_that_the_model_has_not_is_another(model: Any, resident: Any) -> None:
    rows = [{"prompt": text} for text in PROMPTS]
    found = list(
        penstock.generate(model, rows, max_new_tokens=6, tokenizer=PadsBeyond())
    )
    assert [row["completion"] for row in found] == [
        alone(resident, prompt) for prompt in PROMPTS
    ]
    texts = [{"text": text} for text in (GOOD, "4 5 6 7")]
    for scored in penstock.score(model, texts, tokenizer=PadsBeyond()):
        assert "logprob" in scored


def test_places_before_that_of_padding_are_no_context(tmp_path: Path) -> None:
    config = RobertaConfig(
        vocab_size=NUM_IDS,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
        pad_token_id=1,
    )
    RobertaModel(config).save_pretrained(tmp_path)
    with penstock.load(tmp_path, Policy(device_memory="60KiB")) as model:
        assert context_length(model) == 10
        rows = [{"text": " ".join(["5"] * num)} for num in (9, 10, 11, 12)]
        found = list(penstock.embed(model, rows, tokenizer=Numbers()))
        assert ["error" in row for row in found] == [False, False, True, True]
        assert "the model's context is 10" in found[2]["error"]
        with pytest.raises(UsageError, match="1 to 10"):
            list(penstock.embed(model, rows, tokenizer=Numbers(), truncate=12))


# Keys.


def test_keys_that_mean_nothing_to_a_model_are_left_alone(model: Any) -> None:
    row = {"prompt": GOOD, "category": "x", "source": {"a": 1}, "score": 0.5}
    (found,) = generated(model, [row])
    assert found == generated(model, [GOOD])[0] | {"id": found["id"]}


@pytest.mark.parametrize("key", sorted(UNUSED))
def test_a_key_that_is_known_and_not_used_is_named(key: str) -> None:
    for answers in (True, False):
        says = refused({"prompt": GOOD, key: {"something": 1}}, answers=answers)
        assert says is not None
        assert f'"{key}"' in says
        neutrals: list[Any] = [None, UNUSED[key], [], "", {}]
        for neutral in neutrals:
            assert refused({key: neutral}, answers=answers) is None


def test_a_number_that_changes_nothing_may_be_written_in_any_way() -> None:
    assert refused({"presence_penalty": 0.0, "num_beams": 1.0}, answers=True) is None
    assert refused({"presence_penalty": False}, answers=True) is not None
    assert refused({"add_special_tokens": False}, answers=True) is not None


def test_what_is_said_to_a_model_that_answers_is_named(model: Any) -> None:
    row = {"text": GOOD, "system": "be brief"}
    assert '"system"' in generated(model, [row])[0]["error"]
    (scored,) = penstock.score(model, [row], tokenizer=Numbers())
    assert "logprob" in scored


@pytest.mark.parametrize("key", [*SAMPLING, "tools"])
def test_how_to_complete_is_no_key_of_other_tasks(key: str, model: Any) -> None:
    row = {"text": GOOD, key: [1]}
    for call in (penstock.score, penstock.embed):
        (found,) = call(model, [row], tokenizer=Numbers())
        assert f'"{key}"' in found["error"]
    assert f'"{key}"' in generated(model, [row])[0]["error"]


def test_each_row_is_completed_as_it_asks(model: Any) -> None:
    asked: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"max_tokens": 2}, {"max_new_tokens": 2}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"top_k": 1, "max_completion_tokens": 4}, {"top_k": 1, "max_new_tokens": 4}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
    ]
    rows = [
        {"id": n, "prompt": PROMPTS[n % 5], **key} for n, (key, _) in enumerate(asked)
    ]
    together = generated(model, rows)
    for row, found, (_, options) in zip(rows, together, asked, strict=True):
        plain = {"id": row["id"], "prompt": row["prompt"]}
        assert generated(model, [plain], **options) == [found]
    assert together[1]["tokens"] == 2


def test_a_row_with_a_seed_depends_on_that_alone(model: Any) -> None:
    row = {"prompt": GOOD, "temperature": 3.0, "seed": 5, "max_tokens": 12}
    rows = [{**row, "seed": 6}, row, {**row, "seed": None}, row, {**row, "n": 2}]
    other, one, unseeded, same, several = generated(model, rows)
    assert one["completion"] == same["completion"]
    assert len({each["completion"] for each in (one, other, unseeded)}) == 3
    assert several["completions"][0] == one["completion"]
    assert several["completions"][1] != one["completion"]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"temperature": "warm"}, "\"temperature\" is 'warm'"),
        ({"temperature": -1}, '"temperature" is -1'),
        ({"top_p": 1.5}, '"top_p" is 1.5'),
        ({"top_k": 1.5}, '"top_k" is 1.5'),
        ({"n": 0}, '"n" is 0'),
        ({"n": True}, '"n" is True'),
        ({"max_tokens": 0}, '"max_tokens" is 0'),
        ({"max_tokens": 3, "max_new_tokens": 4}, "several limits that differ"),
        ({"stop": [1]}, '"stop" is'),
        ({"stop": [""]}, '"stop" is'),
        ({"stop": ["\ud800"]}, '"stop" is'),
        ({"min_p": float("nan")}, '"min_p" is nan'),
    ],
)
def test_what_a_row_cannot_ask_for_is_named(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(RowError) as caught:
        row_sampling(keys)
    assert says in str(caught.value)


def test_what_does_not_go_together_is_that_rows_error(model: Any) -> None:
    first, bad, seeded = generated(
        model, [GOOD, {"prompt": GOOD, "n": 2}, {"prompt": GOOD, "seed": "x"}]
    )
    assert "error" not in first
    assert "num_return_sequences" in bad["error"]
    assert '"seed"' in seeded["error"]
    assert row_sampling({}) == RowSampling()


# Who is beside a row.


@pytest.mark.parametrize(
    "options",
    [
        {"no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 4, "repetition_penalty": 1.3},
        {"repetition_penalty": 2.5},
        {"encoder_repetition_penalty": 2.5},
        {"bad_words_ids": [[0, 1], [3]]},
        {"min_length": 6, "eos_token_id": list(range(8))},
        {"num_beams": 3, "no_repeat_ngram_size": 2},
        {"num_beams": 2, "repetition_penalty": 2.5},
        {"prompt_lookup_num_tokens": 3},
        {"sequence_bias": [[[0, 7], 9.0]]},
    ],
    ids=lambda options: "-".join(options),
)
def test_what_looks_at_ids_does_not_see_who_is_beside_a_row(
    options: dict[str, Any], model: Any, resident: Any
) -> None:
    found = generated(model, PROMPTS, do_sample=False, **options)
    for prompt, row in zip(PROMPTS, found, strict=True):
        assert row.get("completion") == alone(resident, prompt, **options), row


def test_beams_that_are_drawn_do_not_depend_on_who_is_beside_a_row(model: Any) -> None:
    options = {"num_beams": 2, "temperature": 2.0, "seed": 3}
    wide = generated(model, PROMPTS, **options)
    narrow = [
        generated(model, PROMPTS[: n + 1], **options)[n] for n in range(len(PROMPTS))
    ]
    assert [row["completion"] for row in wide] == [row["completion"] for row in narrow]


# What the checkpoint says of generating.


def generation_config(**values: Any) -> Any:
    return GenerationConfig(**values)  # type: ignore[no-untyped-call]


def way(default: dict[str, Any], notes: list[str], **options: Any) -> Any:
    return way_of(
        generation_config(**default),
        Numbers(),
        Limits(NUM_IDS, 64),
        max_new_tokens=5,
        stop=(),
        options=options,
        note=notes.append,
    )


@pytest.mark.parametrize("more", [{}, {"num_return_sequences": 10**7}])
def test_a_prompt_goes_on_in_no_more_ways_than_anybody_needs(
    more: dict[str, Any],
) -> None:
    with pytest.raises(UsageError, match=r"is 10,000,000: .* at most 10,000 ways"):
        way({"num_beams": 10**7, **more}, [])


@pytest.mark.parametrize(
    "default",
    [
        {"return_dict_in_generate": True},
        {"output_scores": True, "return_dict_in_generate": True},
        {"output_hidden_states": True},
        {"cache_implementation": "offloaded"},
        {"cache_implementation": "static"},
        {"max_time": 1e-6},
        {"assistant_early_exit": 2},
        {"pad_token_id": -1},
        {"pad_token_id": NUM_IDS},
        {"max_length": 20},
    ],
    ids=str,
)
def test_what_has_no_place_in_a_job_is_left_out_with_a_word(
    default: dict[str, Any], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = generated(model, PROMPTS)
    monkeypatch.setattr(model, "generation_config", generation_config(**default))
    assert generated(model, PROMPTS) == before
    notes: list[str] = []
    way(default, notes)
    is_said = [key for key in default if not key.endswith(("pad_token_id", "length"))]
    assert len(notes) == len(is_said)


def test_stop_strings_of_the_checkpoint_are_among_those_that_end_a_text() -> None:
    notes: list[str] = []
    assert way({"stop_strings": "ab"}, notes).stop == ("ab",)
    assert way({}, notes, stop_strings=["a", "b"]).stop == ("a", "b")
    assert notes == []


def test_rows_share_micro_batches_unless_an_option_looks_at_what_is_before_them() -> (
    None
):
    usual = {"bos_token_id": 2, "eos_token_id": [3], "cache_implementation": "static"}
    usual |= {"repetition_penalty": 1.05, "some_future_key": 3}
    assert way(usual, [], temperature=0.7, top_p=0.9).company == "any"
    assert way(usual, [], min_length=5).company == "equal"
    assert way(usual, [], num_beams=2).company == "equal"
    assert way({}, [], num_beams=2).company == "any"
    assert way({}, [], num_beams=2, do_sample=True).company == "alone"
    assert way({}, [], prompt_lookup_num_tokens=2).company == "alone"


def test_options_that_nothing_comes_of_are_refused() -> None:
    for options in (
        {"output_scores": True},
        {"output_logits": True},
        {"max_time": 1e-6},
        {"assistant_early_exit": 2},
        {"dola_layers": "low"},
        {"cache_implementation": "offloaded"},
        {"frobnicate": 1},
        {"temperature": float("nan")},
        {"top_k": "abc"},
        {"max_length": 14},
    ):
        with pytest.raises(UsageError, match=next(iter(options))):
            way({}, [], **options)
    assert (
        way({}, [], return_dict_in_generate=True).config.return_dict_in_generate
        is not True
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_beams", 0),
        ("num_beams", 1.5),
        ("num_return_sequences", "x"),
        ("top_k", "x"),
        ("top_p", [0.5]),
        ("temperature", float("nan")),
        ("repetition_penalty", 0),
        ("no_repeat_ngram_size", "x"),
        ("encoder_no_repeat_ngram_size", 10**9),
        ("min_new_tokens", {"a": 1}),
        ("typical_p", 0),
        ("prompt_lookup_num_tokens", -1),
    ],
)
def test_a_number_that_would_fail_with_every_row_is_refused(
    key: str, value: Any
) -> None:
    """Wherever it was said: before any row runs."""
    default = generation_config(do_sample=True)
    setattr(default, key, value)  # a file is taken without a look at it
    limits = Limits(NUM_IDS, 64)
    with pytest.raises(UsageError, match=key):
        way_of(default, Numbers(), limits, max_new_tokens=5, stop=(), options={})
    with pytest.raises(UsageError, match=key):
        way({"do_sample": True}, [], **{key: value})


def test_numbers_of_the_checkpoint_are_what_transformers_wants() -> None:
    config = way({"repetition_penalty": 2, "top_k": 20.0, "num_beams": 2.0}, []).config
    assert (config.repetition_penalty, config.num_beams) == (2.0, 2)
    assert isinstance(config.repetition_penalty, float)
    assert isinstance(config.num_beams, int)
    assert way({"top_k": -1, "top_p": 0.0}, []).config.do_sample is not True


def test_sampling_at_temperature_0_is_refused_unless_something_else_is_asked_for() -> (
    None
):
    default = {"do_sample": True, "temperature": 0.0}
    with pytest.raises(UsageError, match="temperature 0"):
        way(default, [])
    assert way(default, [], temperature=0.5).config.temperature == 0.5
    assert not way(default, [], temperature=0).config.do_sample


# Chats.


class Chats(Numbers):
    """Its template writes what it is given."""

    chat_template = "{{ messages }} {{ tools }} {{ thinking }}"

    def apply_chat_template(self, messages: Any, **options: Any) -> dict[str, Any]:
        ids = [int(message["content"]) for message in messages]
        ids += [len(options.get("tools", ()))]
        if options.get("thinking"):
            ids.append(39)
        return {"input_ids": ids}


def chat(**row: Any) -> tuple[int, ...]:
    return tokenize_chat(
        Chats(), {"messages": [{"role": "user", "content": "7"}], **row}
    )


def test_tools_and_arguments_go_to_the_chat_template() -> None:
    assert chat() == (7, 0)
    assert chat(tools=[{"name": "f"}, {"name": "g"}]) == (7, 2)
    assert chat(chat_template_kwargs={"thinking": True}) == (7, 0, 39)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": []}, "a list of messages is needed"),
        ({"messages": "hi"}, "a list of messages is needed"),
        ({"messages": ["hi"]}, "message 0 is 'hi'"),
        ({"messages": [{"content": "7"}]}, 'it needs a "role"'),
        ({"messages": [{"role": "user", "content": 7}]}, "neither a text nor a list"),
        ({"chat_template_kwargs": {"unheard": 1}}, "does not use 'unheard'"),
        ({"chat_template_kwargs": {"tokenize": False}}, "'tokenize'"),
        ({"chat_template_kwargs": [1]}, "are not an object"),
        ({"tools": {"name": "f"}}, "are not a list of objects"),
        *[
            (
                {"messages": [{"role": "user", "content": [{"type": kind}]}]},
                f"a part of type '{kind}'",
            )
            for kind in ("image", "image_url", "video", "input_audio")
        ],
    ],
)
def test_a_chat_that_cannot_be_written_is_named(row: dict[str, Any], says: str) -> None:
    with pytest.raises(RowError) as caught:
        chat(**row)
    assert says in str(caught.value)


def test_an_empty_chat_fails_alone(model: Any) -> None:
    rows: list[Any] = [
        {"messages": [{"role": "user", "content": "7"}]},
        {"messages": []},
    ]
    good, bad = generated(model, rows, tokenizer=Chats())
    assert "error" not in good
    assert "messages" in bad["error"]


def test_ids_that_json_has_not_do_not_end_a_job(tmp_path: Path) -> None:
    from jobs import read_lines, run_job

    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    deep = "[" * 990 + "]" * 990
    lines = ['{"id": 1e999, "text": "a"}', '{"id": [NaN], "text": "a"}']
    lines += ['{"id": [-1e999], "text": "a"}', f'{{"id": {deep}, "text": "a"}}']
    source.write_text("\n".join([*lines, '{"id": [1, {"a": 2}], "text": "a"}']) + "\n")
    run_job(source, output)
    *bad, good = read_lines(output)
    assert ["error" in row for row in bad[:3]] == [True] * 3
    assert [row["id"] for row in bad[:3]] == [1, 2, 3]
    assert good["id"] == [1, {"a": 2}]
    assert json.dumps(bad)


def test_a_text_that_no_tokenizer_should_get_is_an_error_of_its_row(model: Any) -> None:
    long = "1 " * 2_000_001
    for name, found in tasks(model, [GOOD, long, GOOD]).items():
        assert "has 4,000,002 letters: a text may have" in found[1]["error"], name
        assert "error" not in found[0] | found[2], name
