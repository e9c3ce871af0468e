"""Completing a file of prompts: the resident model's tokens, in order, whatever the
rows and whoever is beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_planner import machine_of
from test_score import read, run, settings
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

import penstock
import zoo
from checkpoint import make_checkpoint
from common.id_tokenizer import Numbers
from penstock import Policy
from penstock.io.errors import UsageError
from penstock.offload.generation.decoding import RowSampler
from penstock.offload.plans.forecast import forecast, generating_of
from penstock.offload.tasks.generate import GenerateProgress
from penstock.offload.tasks.generate_task import Generate
from penstock.offload.weights.blueprint import blueprint
from shares import in_turns, shared

pytestmark = pytest.mark.usefixtures("no_leaks")

PROMPTS = [
    "The quick brown fox",
    "import os\nprint(",
    "Two words",
    "A",
    "Zwölf Boxkämpfer jagen Viktor quer über den",
    "The quick brown dog",
    "Once upon a time there was",
]
ROWS = [{"id": number, "prompt": text} for number, text in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    return make_checkpoint(path, "tiny", dtype="float32", shards_of="100KB")


@pytest.fixture(scope="module")
def resident(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).train(False)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def policy(**values: Any) -> Policy:
    return Policy(device_memory="220KiB", gather_rows=1000, resident_below=10, **values)


def alone(resident: Any, tokenizer: Any, text: str, **options: Any) -> list[int]:
    """New tokens of one prompt by transformers' own `generate`."""
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.inference_mode():
        found = resident.generate(ids, **options)
    return found[0, ids.shape[1] :].tolist()  # type: ignore[no-any-return]


def completions(folder: Path, rows: Any = ROWS, **options: Any) -> list[dict[str, Any]]:
    values = options.pop("policy", {})
    with penstock.load(folder, policy(**values)) as model:
        return list(penstock.generate(model, rows, **options))


@pytest.mark.parametrize(
    ("rows", "in_flight"),
    shared(
        [(1, 1), (1, 4), (3, 4), (1, 256), (3, 256), (8, 256)],
        lambda _, case: case in ((1, 4), (3, 4), (8, 256)),
    ),
)
def test_completions_are_the_resident_models(
    rows: int, in_flight: int, folder: Path, resident: Any, tokenizer: Any
) -> None:
    found = completions(
        folder,
        max_new_tokens=9,
        policy={"micro_batch_sequences": rows, "sequences_in_flight": in_flight},
    )
    assert [result["id"] for result in found] == list(range(len(PROMPTS)))
    for text, result in zip(PROMPTS, found, strict=True):
        ids = alone(resident, tokenizer, text, max_new_tokens=9, do_sample=False)
        assert result["completion"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert result["tokens"] == len(ids)


def eos_of(resident: Any, tokenizer: Any, text: str, place: int) -> int:
    """A token that the greedy completion of `text` has at `place`, and not before."""
    ids = alone(resident, tokenizer, text, max_new_tokens=9, do_sample=False)
    assert ids[place] not in ids[:place]
    return ids[place]


def test_a_row_that_ends_is_done_and_the_others_go_on(
    folder: Path, resident: Any, tokenizer: Any
) -> None:
    end = eos_of(resident, tokenizer, PROMPTS[0], 3)
    found = completions(folder, max_new_tokens=9, eos_token_id=end)
    assert (found[0]["tokens"], found[0]["finish_reason"]) == (4, "stop")
    for text, result in zip(PROMPTS, found, strict=True):
        ids = alone(
            resident,
            tokenizer,
            text,
            max_new_tokens=9,
            do_sample=False,
            eos_token_id=end,
        )
        assert result["tokens"] == len(ids)
        assert result["finish_reason"] == ("stop" if ids[-1] == end else "length")
    assert {result["finish_reason"] for result in found} == {"stop", "length"}


def test_a_stop_string_ends_a_row_and_is_cut_off(
    folder: Path, resident: Any, tokenizer: Any, tmp_path: Path
) -> None:
    ids = alone(resident, tokenizer, PROMPTS[0], max_new_tokens=9, do_sample=False)
    text = tokenizer.decode(ids)
    stop = text[4:6]
    (found,) = completions(folder, ROWS[:1], max_new_tokens=9, stop=[stop])
    assert found["completion"] == text[: text.find(stop)]
    assert found["finish_reason"] == "stop"
    assert found["tokens"] < 9
    rows = [{**ROWS[0], "stop": stop}, ROWS[0], {**ROWS[0], "stop": [stop, "never"]}]
    its_own, whole, its_own_too = completions(folder, rows, max_new_tokens=9)
    assert its_own == its_own_too == found
    assert whole["completion"] == text
    of_options = completions(folder, ROWS[:1], max_new_tokens=9, stop_strings=[stop])
    assert of_options == [found]
    of_its_own = folder_with(folder, tmp_path, stop_strings=[stop])
    assert completions(of_its_own, ROWS[:1], max_new_tokens=9) == [found]


def folder_with(folder: Path, new: Path, **values: Any) -> Path:
    """A copy of the model with `values` in its generation_config.json."""
    shutil.copytree(folder, new / "model")
    path = new / "model" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return new / "model"


@pytest.mark.parametrize("pad", [None, 7])
def test_beams_that_end_at_a_stop_string_are_counted_to_there(
    pad: int | None, folder: Path, resident: Any, tokenizer: Any
) -> None:
    """Whatever is behind them: they are padded to the longest one beside them."""
    options: dict[str, Any] = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    if pad is not None:
        options["pad_token_id"] = pad
    stop = ["e", "a", "()"]
    found = completions(folder, stop=stop, **options)
    lengths = []
    for row in ROWS:
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        more = {"stop_strings": stop, "tokenizer": tokenizer}
        with torch.inference_mode():
            new = resident.generate(ids, **options, **more)
        lengths.append(new.shape[1] - ids.shape[1])
    assert [row["tokens"] for row in found] == lengths
    assert len(set(lengths)) > 1


def test_samples_do_not_depend_on_the_rows_beside_them(folder: Path) -> None:
    options = {"max_new_tokens": 6, "temperature": 1.5, "top_k": 50, "seed": 3}
    wide = completions(folder, **options)
    narrow = completions(
        folder,
        policy={
            "micro_batch_sequences": 1,
            "sequences_in_flight": 2,
        },
        **options,
    )
    assert wide == narrow
    twice = completions(folder, [ROWS[0], ROWS[0]], **options)
    assert twice[0]["completion"] != twice[1]["completion"]
    other = completions(folder, **{**options, "seed": 4})
    assert [r["completion"] for r in other] != [r["completion"] for r in wide]
    greedy = completions(folder, max_new_tokens=6, temperature=0)
    assert [r["completion"] for r in greedy] != [r["completion"] for r in wide]


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]]).log_softmax(-1)
    counts = torch.zeros(4)
    sampler = RowSampler([7])
    for _ in range(4_000):
        counts[sampler(torch.empty(1, 0), scores).argmax(-1)] += 1
    assert torch.allclose(counts / 4_000, scores[0].exp(), atol=0.03)
    assert counts[3] == 0


def test_beams_and_several_completions_are_transformers_own(
    folder: Path, resident: Any, tokenizer: Any
) -> None:
    found = completions(folder, ROWS[:3], max_new_tokens=5, num_beams=3)
    for text, result in zip(PROMPTS, found, strict=False):
        ids = alone(resident, tokenizer, text, max_new_tokens=5, num_beams=3)
        assert result["completion"] == tokenizer.decode(ids, skip_special_tokens=True)
    several = completions(
        folder, ROWS[:2], max_new_tokens=4, temperature=1.0, num_return_sequences=3
    )
    assert [len(result["completions"]) for result in several] == [3, 3]
    assert all(len(set(result["completions"])) > 1 for result in several)


@pytest.mark.parametrize("in_flight", shared([8, 64, 512], lambda n, _: n < 2))
def test_weights_are_read_once_for_all_sequences_in_flight(
    in_flight: int, folder: Path
) -> None:
    rows = [{"id": n, "prompt": "The quick brown fox"} for n in range(in_flight + 8)]
    values = {"micro_batch_sequences": 8, "sequences_in_flight": in_flight}
    progress = GenerateProgress()
    with penstock.load(folder, policy(**values)) as model:
        list(penstock.generate(model, rows, max_new_tokens=4, progress=progress))
        statistics = penstock.statistics(model)
    assert progress.output_tokens == len(rows) * 4
    assert statistics.passes == 2 * 4, "those in flight, then the other eight"
    streamed = statistics.bytes_by_tier["disk"]
    # Each pass reads all that is streamed, but for what is still there from the last.
    assert statistics.bytes_loaded <= 8 * streamed + statistics.bytes_by_tier["device"]
    assert statistics.bytes_loaded >= 0.5 * 8 * streamed


COMPLETES = [
    name
    for name in zoo.names(generates=True)
    if zoo.ARCHITECTURES[name].kind in ("causal", "seq2seq")
    and name != "rwkv_rescaled"  # it writes to its weights, which is refused
]


TIERS = ("auto", "device", "host", "disk")
WAYS = [
    (tier, refilled, coalesce)
    for refilled in (True, False)
    for coalesce in ("auto", "off")
    for tier in TIERS
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tier", "refilled", "coalesce"),
    [
        pytest.param(
            name,
            *way,
            marks=[] if WAYS.index(way) == n % 4 and n % 3 == 0 else pytest.mark.whole,
        )
        for n, name in enumerate(COMPLETES)
        for way in WAYS
    ],
)
def test_every_model_that_generates_completes_a_file(
    name: str, tier: str, refilled: bool, coalesce: str, tmp_path: Path
) -> None:
    """Ragged prompts, more of them than places (or not), and one token that ends some
    of them early: each is completed as if alone, wherever keys and values are."""
    zoo.save_checkpoint(name, tmp_path)
    resident = zoo.load(name, tmp_path)
    ids = zoo.inputs(name, rows=1, tokens=7)["input_ids"][0].tolist()
    prompts = [ids[:5], ids, ids[2:], ids[:5][::-1], ids[::-1]]

    def alone(prompt: list[int], **options: Any) -> list[int]:
        with torch.inference_mode():
            found = resident.generate(
                torch.tensor([prompt]), max_new_tokens=4, do_sample=False, **options
            )[0]
        start = 1 if resident.config.is_encoder_decoder else len(prompt)
        return found[start:].tolist()  # type: ignore[no-any-return]

    end = alone(prompts[1])[2]
    expected = [alone(prompt, eos_token_id=end, pad_token_id=0) for prompt in prompts]
    rows = [{"prompt": " ".join(map(str, prompt))} for prompt in prompts]
    # transformers' own rwkv goes on otherwise with two rows than with one.
    rows_each = 1 if name.startswith("rwkv") else 2
    policy = Policy(
        device_memory="1MiB",
        micro_batch_sequences=rows_each,
        sequences_in_flight=4 if refilled else 256,
        coalesce=coalesce,
        kv={"tier": tier},
        links={"host": {"bandwidth": "50GB"}},  # so that it is not the device's
        io={"cache": str(tmp_path / "cache")},
    )
    with penstock.load(tmp_path, policy) as model:
        results = list(
            penstock.generate(
                model,
                rows,
                max_new_tokens=4,
                tokenizer=Numbers(),
                do_sample=False,
                eos_token_id=end,
            )
        )
    for ids, result in zip(expected, results, strict=True):
        assert result.get("completion") == " ".join(map(str, ids)), result
        assert (result["finish_reason"] == "stop") == (ids[-1] == end)


class Widths:
    """Rows of each call of the model's first block."""

    def __init__(self, model: Any) -> None:
        self.calls: list[int] = []
        model.model.layers[0].register_forward_pre_hook(self._note)

    def _note(self, block: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        self.calls.append(arguments[0].shape[0])


def with_one_long_row(
    folder: Path, resident: Any, tokenizer: Any, **options: Any
) -> tuple[list[dict[str, Any]], list[int], int]:
    """Three rows of four end after a token, one of the first four goes on."""
    long, short = PROMPTS[0], PROMPTS[5]
    assert len(tokenizer(long)["input_ids"]) == len(tokenizer(short)["input_ids"])
    end = eos_of(resident, tokenizer, short, 0)
    assert end not in alone(
        resident, tokenizer, long, max_new_tokens=9, do_sample=False
    )
    rows = [{"prompt": text} for text in (long, short, short, short, *[short] * 4)]
    values = options.pop("policy", {})
    fixed = {"micro_batch_sequences": 4, "sequences_in_flight": 5}
    with penstock.load(folder, policy(**{**fixed, **values})) as model:
        widths = Widths(model)
        found = list(
            penstock.generate(
                model, rows, max_new_tokens=9, eos_token_id=end, **options
            )
        )
        return found, widths.calls, penstock.statistics(model).passes


@pytest.mark.parametrize("tier", TIERS)
def test_rows_that_have_ended_make_place(
    tier: str, folder: Path, resident: Any, tokenizer: Any, tmp_path: Path
) -> None:
    values: dict[str, Any] = {"kv": {"tier": tier}, "io": {"cache": str(tmp_path)}}
    rows, widths, passes = with_one_long_row(
        folder, resident, tokenizer, policy={**values, "prompt_tokens": "all"}
    )
    assert [row["tokens"] for row in rows] == [9] + 7 * [1]
    assert sorted(widths) == [1] * 8 + [4] * 2
    assert passes == 9, "the others came in beside the long one"
    same, widths, passes = with_one_long_row(
        folder, resident, tokenizer, policy={**values, "coalesce": "off"}
    )
    assert same == rows
    assert widths == [4] * (9 + 1), "the same bits: of the same products"
    assert passes == 9 + 1


@pytest.mark.parametrize(
    ("options", "shrinks"),
    [
        ({"temperature": 1.3, "top_k": 40, "repetition_penalty": 1.2}, True),
        ({"no_repeat_ngram_size": 2, "min_new_tokens": 2, "top_p": 0.9}, True),
        ({"encoder_repetition_penalty": 1.3}, False),  # remembers each row's prompt
        ({"num_return_sequences": 2, "temperature": 1.0}, True),
    ],
)
def test_what_rows_leave_behind_changes_nothing(
    options: dict[str, Any], shrinks: bool, folder: Path, tokenizer: Any
) -> None:
    """Ends by chance, early and late, with every kind of processor."""
    ends = list(range(100, 160))
    found = {}
    for coalesce in ("auto", "off"):
        values = {"coalesce": coalesce, "prompt_tokens": "all"}
        with penstock.load(folder, policy(**values)) as model:
            widths = Widths(model)
            found[coalesce] = list(
                penstock.generate(
                    model,
                    [ROWS[0]] * 6 + [ROWS[5]] * 2,
                    max_new_tokens=20,
                    eos_token_id=ends,
                    seed=5,
                    **options,
                )
            )
        assert (len(set(widths.calls)) > 1) == (shrinks and coalesce == "auto")
    assert found["auto"] == found["off"]


STATEFUL = ("jamba", "mamba", "recurrent_gemma", "qwen3_next", "minimax")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        name
        if name in (*STATEFUL, "llama", "gemma3_text", "gpt2", "mpt", "t5")
        else pytest.param(name, marks=pytest.mark.whole)
        for name in COMPLETES
    ],
)
def test_prompts_that_come_in_by_and_by_are_completed_the_same(
    name: str, tmp_path: Path
) -> None:
    """Or come in at once, where the model would begin its state anew."""
    zoo.save_checkpoint(name, tmp_path)
    ids = zoo.inputs(name, rows=1, tokens=11)["input_ids"][0].tolist()
    rows = [{"prompt": " ".join(map(str, ids[start:]))} for start in range(4)]
    found = []
    for prompt_tokens in ("all", 4):
        policy = Policy(
            device_memory="1MiB",
            prompt_tokens=prompt_tokens,
            micro_batch_sequences=1 if name.startswith("rwkv") else 2,
        )
        with penstock.load(tmp_path, policy) as model:
            found.append(
                list(
                    penstock.generate(
                        model, rows, max_new_tokens=4, tokenizer=Numbers(), top_k=1
                    )
                )
            )
            passes = penstock.statistics(model).passes
    assert found[0] == found[1]
    assert all("error" not in result for result in found[0]), found[0]
    if name in (*STATEFUL, "t5", "mpt"):
        assert passes <= 5, "one for the prompts, one for each token, or part of one"
    elif name == "llama":
        assert passes == 3 + 3


@pytest.mark.parametrize(
    ("values", "passes"),
    [
        ({}, 1 + 3),  # few rows: their prompts at once make a pass
        ({"tokens_in_flight": 40}, 4 + 3),
        ({"tokens_in_flight": 200, "micro_batch_tokens": 200}, 1 + 3),
        ({"tokens_in_flight": 40, "prompt_tokens": "all"}, 1 + 3),
        ({"tokens_in_flight": 40, "coalesce": "off"}, 1 + 3),
        ({"prompt_tokens": 10}, 5 + 3),
    ],
)
def test_long_prompts_come_in_beside_the_others_decode(
    values: dict[str, Any], passes: int, folder: Path, resident: Any, tokenizer: Any
) -> None:
    """A prompt of 50 tokens or so, and short ones, which are done meanwhile. The last
    part of the prompt has the first token."""
    text = "The quick brown fox jumps over the lazy dog. " * 4
    ids = tokenizer(text)["input_ids"][:50]
    rows = [{"prompt": tokenizer.decode(ids, skip_special_tokens=True)}, *ROWS[:2]]
    values = {"micro_batch_tokens": 10, **values}
    progress = GenerateProgress()
    with penstock.load(folder, policy(**values)) as model:
        found = list(
            penstock.generate(model, rows, max_new_tokens=4, progress=progress)
        )
        made = penstock.statistics(model).passes
    longest = len(tokenizer(rows[0]["prompt"])["input_ids"])
    assert 40 < longest <= 60
    assert made == passes
    for row, result in zip(rows, found, strict=True):
        ids = alone(
            resident, tokenizer, row["prompt"], max_new_tokens=4, do_sample=False
        )
        assert result["completion"] == tokenizer.decode(ids, skip_special_tokens=True)


def passes_of(folder: Path, asked: Policy, rows: list[dict[str, Any]]) -> int:
    """The passes of a job with three new tokens for each row, none of which ends
    early."""
    with penstock.load(folder, asked) as model:
        model.generation_config.eos_token_id = None
        how: dict[str, Any] = {"max_new_tokens": 3, "tokenizer": Numbers()}
        found = list(penstock.generate(model, rows, **how))
        made = penstock.statistics(model).passes
    assert not any("error" in result for result in found)
    return made


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"micro_batch_sequences": 4},
        {"micro_batch_sequences": 1},
        {"coalesce": "off"},
        {"prompt_tokens": 7},
        {"prompt_tokens": "all"},
    ],
)
def test_a_plan_has_as_many_passes_as_the_job(
    values: dict[str, Any], folder: Path
) -> None:
    values = {"tokens_in_flight": 32, "micro_batch_tokens": 16, **values}
    asked = policy(sequences_in_flight=8, **values)
    rows = [{"prompt": " ".join(["7"] * 24)}] * 8
    work = generating_of(asked, 8, 24, 3, in_parts=True)
    assert passes_of(folder, asked, rows) == len(work.chunks) + work.new_tokens - 1


@pytest.mark.parametrize("name", ["mamba", "jamba", "t5", "gpt2"])
def test_a_plan_knows_whose_prompts_come_whole(name: str, tmp_path: Path) -> None:
    zoo.save_checkpoint(name, tmp_path)
    asked = Policy(
        device_memory="1MiB",
        prompt_tokens=4,
        sequences_in_flight=2,
        micro_batch_sequences=1,
    )
    skeleton, _ = blueprint(tmp_path, asked.dtype)
    planned = forecast(
        skeleton.model, skeleton.recipes, asked, machine_of(), Generate(3)
    )
    work = generating_of(asked, 2, 11, 3, in_parts=planned.shape.prompts_in_parts)
    assert work.chunks == ((4, 4, 3) if name == "gpt2" else (11,))
    ids = zoo.inputs(name, rows=1, tokens=11)["input_ids"][0].tolist()
    rows = [{"prompt": " ".join(map(str, ids))}] * 2
    assert passes_of(tmp_path, asked, rows) == len(work.chunks) + work.new_tokens - 1


@pytest.fixture(scope="module")
def thrice(folder: Path) -> list[dict[str, Any]]:
    return completions(folder, ROWS * 3, max_new_tokens=5)


@pytest.mark.parametrize(("tier", "coalesce"), in_turns(TIERS, ["auto", "off"]))
def test_keys_and_values_may_be_anywhere(
    tier: str,
    coalesce: str,
    thrice: list[dict[str, Any]],
    folder: Path,
    tmp_path: Path,
) -> None:
    """Refilled all the time, and never what was kept for somebody else."""
    values = {
        "kv": {"tier": tier},
        "coalesce": coalesce,
        "micro_batch_sequences": 2,
        "sequences_in_flight": 4,
        "io": {"cache": str(tmp_path)},
    }
    found = completions(folder, ROWS * 3, max_new_tokens=5, policy=values)
    assert [r["completion"] for r in found] == [r["completion"] for r in thrice]


def in_flight(folder: Path, tier: str, cache: Path) -> tuple[int, torch.Tensor]:
    """Micro-batches of long prompts that fit a budget for what they keep, and what they
    generate."""
    fixed = Policy(
        device_memory="16MiB",
        activation_memory="8MiB",
        kv={"tier": tier, "limits": {tier: "1GiB"}},
        links={"host": {"bandwidth": "50GB"}},  # so that it is not the device's
        io={"cache": str(cache)},
    )
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(5, 64, (2, 96), generator=generator) for _ in range(32)]

    def fn(ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model.generate(
            ids, max_new_tokens=3, do_sample=False, pad_token_id=0
        )
        return found

    with penstock.load(folder, fixed) as model, penstock.sweep(model) as sweep:
        results = torch.cat(sweep.map(fn, batches))
        return sweep.statistics().max_in_flight, results


@pytest.mark.whole
@pytest.mark.slow
def test_four_times_as_many_fit_where_their_keys_and_values_are_elsewhere(
    tmp_path: Path,
) -> None:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=16,
        num_attention_heads=4,
        vocab_size=64,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "deep")
    found = {
        tier: in_flight(tmp_path / "deep", tier, tmp_path)
        for tier in ("device", "host", "disk")
    }
    num, expected = found["device"]
    assert num > 1
    for tier in ("host", "disk"):
        assert found[tier][0] >= 4 * num
        assert torch.equal(found[tier][1], expected)


# Rows that nothing can be made of, and mistakes.


def test_a_bad_row_is_an_error_of_its_own(folder: Path) -> None:
    rows = [
        {"id": "a", "prompt": ""},
        {"id": "b", "prompt": "fine"},
        {"id": "c", "prompt": "word " * 2_000},
        {"id": "d", "messages": [{"role": "user", "content": "hi"}]},
        {"id": "e", "prompt": 5},
    ]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    found = completions(folder, rows, max_new_tokens=3, tokenizer=tokenizer)
    assert [result["id"] for result in found] == list("abcde")
    assert found[1]["tokens"] == 3
    errors = [result.get("error", "") for result in found]
    assert not errors[0], "the tokenizer's start of text is something to go on from"
    assert "the model's context is" in errors[2]
    assert "no chat template" in errors[3]
    assert "not a string" in errors[4]


def test_a_chat_is_written_by_the_tokenizers_template(
    folder: Path, resident: Any, tokenizer: Any
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    rows = [{"messages": [{"role": "user", "content": "hi"}]}]
    (found,) = completions(folder, rows, max_new_tokens=5, tokenizer=tokenizer)
    encoded = tokenizer("user: hi\nassistant:", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        ids = resident.generate(
            torch.tensor([encoded]), max_new_tokens=5, do_sample=False
        )[0, len(encoded) :]
    assert found["completion"] == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 3, "temprature": 2}, "no option 'temprature'"),
        ({"max_new_tokens": 3, "early_stopping": "x"}, "cannot be combined: .*early"),
        (
            {"max_new_tokens": 3, "stop": ["x" * 99_999]},
            "1 stop strings of up to 99999",
        ),
        (
            {"max_new_tokens": 3, "stop": ["x"] * 9 + list(map(chr, range(2**14)))},
            "may be",
        ),
        (
            {"max_new_tokens": 3, "stop": ["\ud800"]},
            "stop strings .*UnicodeEncodeError",
        ),
    ],
)
def test_a_mistaken_option_is_one_sentence(
    options: dict[str, Any], says: str, folder: Path
) -> None:
    with pytest.raises(UsageError, match=says):
        completions(folder, **options)


# The command line.


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: Any) -> Path:
        path = tmp_path / "in.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def test_the_command_writes_completions_and_a_report(
    folder: Path, source: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    done = run(
        "generate",
        folder,
        source(*ROWS),
        "-o",
        out,
        "--max-new-tokens",
        4,
        "--report",
        tmp_path,
        *settings(),
    )
    assert done.returncode == 0, done.stderr
    assert read(out) == completions(folder, max_new_tokens=4)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["output_tokens"] == 4 * len(ROWS)
    assert report["prompt_tokens"] > len(ROWS)
    assert report["tokens"] == report["output_tokens"] + report["prompt_tokens"]
    assert report["passes"] == report["plan"]["passes"] == 4


def test_the_command_names_bad_lines_and_goes_on(
    folder: Path, source: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    arguments = ("-o", out, "--max-new-tokens", 2, *settings())
    done = run("generate", folder, source({"id": 1}, ROWS[1]), *arguments)
    assert done.returncode == 1
    error, fine = read(out)
    assert 'line 1 has no "prompt", nor "text", nor "messages"' in error["error"]
    assert fine["tokens"] == 2


@pytest.mark.parametrize("key", ["seed", "stop", "max_new_tokens", "progress"])
def test_the_command_says_what_is_no_option_of_generate(
    key: str, folder: Path, source: Callable[..., Path], tmp_path: Path
) -> None:
    arguments = ("-o", tmp_path / "out.jsonl", "--max-new-tokens", 4)
    done = run("generate", folder, source(ROWS[0]), *arguments, "--option", f"{key}=3")
    assert done.returncode == 2
    assert f"{key} is no --option" in done.stderr


def test_what_rows_ask_for_is_forgotten_behind_them(folder: Path) -> None:
    """Each may ask for something else, and what ends a text takes memory."""
    rows = [{"prompt": "fine", "stop": f"{n}x", "max_tokens": 1} for n in range(9)]
    rows[4]["stop"] = "x" * 99_999
    found = completions(
        folder,
        rows,
        max_new_tokens=3,
        policy={"sequences_in_flight": 2, "micro_batch_sequences": 2},
    )
    assert "stop strings" in found.pop(4)["error"]
    assert all(row["tokens"] == 1 for row in found)


def test_the_command_takes_any_option_of_generate(
    folder: Path, source: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    arguments = ("-o", out, "--max-new-tokens", 4, "--option", "num_beams=3")
    done = run("generate", folder, source(*ROWS[:2]), *arguments, *settings())
    assert done.returncode == 0, done.stderr
    assert read(out) == completions(folder, ROWS[:2], max_new_tokens=4, num_beams=3)
    done = run("generate", folder, source(*ROWS[:2]), *arguments, "--option", "x")
    assert done.returncode == 2
    assert "write key=value" in done.stderr
