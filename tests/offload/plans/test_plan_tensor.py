"""Plans for ranks that divide matrix products, and for which passes they are faster
than ranks that gather weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_plan_devices import LLAMA, MIXTRAL, ways_of
from test_plan_ranks import CPU, LOW, planned
from typer.testing import CliRunner

from penstock.io.errors import UsageError
from penstock.offload.cli import app
from penstock.offload.plans.plan import Plan, make_plan
from penstock.offload.plans.planned import Workload
from penstock.offload.plans.rank_plans import PassSwitch, two_ways
from penstock.offload.plans.ranked import RankGroup, gathering_planner, messages_of
from penstock.offload.plans.tensor_ranked import TensorPlanner, tensor_planner
from penstock.offload.policy import Policy
from penstock.offload.tasks.generate_task import Generate
from penstock.scheduler.cost.shape import MicroBatchShape, ModelShape
from penstock.scheduler.cost.switch import Switch, switch_of

GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 768,
    "n_layer": 4,
    "n_head": 12,
    "vocab_size": 4000,
    "dtype": "bfloat16",
}


def tensor_plan(
    folder: Path, group: RankGroup, config: dict[str, Any] = LLAMA, **policy: Any
) -> tuple[Plan, TensorPlanner]:
    made = planned(folder, group, config, ranks="tensor", **policy)
    assert isinstance(made.planner, TensorPlanner)
    return made, made.planner


@pytest.mark.parametrize("num", [2, 4])
def test_each_rank_has_a_part_of_each_product_and_all_of_the_rest(
    num: int, tmp_path: Path
) -> None:
    alone = planned(tmp_path, None).choice.forecast.shape
    made, planner = tensor_plan(tmp_path, RankGroup(num, num))
    own = made.choice.forecast.shape
    cut = sum(one.module.get_parameter("weight").numel() for one in planner.cut.layers)
    head = 2.0 * LLAMA["vocab_size"] * LLAMA["hidden_size"]
    assert own.flops_per_token == pytest.approx(2.0 * cut + head)
    assert alone.flops_per_token - head == pytest.approx(2.0 * cut * num)
    assert planner.flops_per_token(made.choice) == pytest.approx(alone.flops_per_token)
    assert own.kv_bytes_per_token == alone.kv_bytes_per_token  # on every rank
    assert [site.pointwise_per_token for site in own.sites] == [
        site.pointwise_per_token for site in alone.sites
    ]
    assert made.policy.ranks == "tensor"
    assert made.to_json()["ranks"] == num


def test_outputs_are_put_together_as_the_runtime_does(tmp_path: Path) -> None:
    """Seven products a block, each once a micro-batch: half of each output comes from
    the other rank."""
    made, planner = tensor_plan(tmp_path, RankGroup(2, 2))
    model = planner.model_of(made.choice.policy, made.choice.forecast)
    wide, hidden, blocks = LLAMA["intermediate_size"], LLAMA["hidden_size"], 8
    assert sum(one.num for one in model.gathers) == 7 * blocks
    outputs = blocks * (5 * hidden + 2 * wide)
    itemsize = made.choice.forecast.shape.itemsize
    assert planner.output_bytes_per_token == outputs * itemsize
    got = sum(one.bytes_per_token for one in model.gathers)
    assert got == outputs * itemsize / 2
    messages = messages_of(CPU, RankGroup(2, 2))
    assert sum(model.gather_seconds(3, 100)) == pytest.approx(
        3 * 7 * blocks * messages.seconds + 100 * got / messages.bytes_per_second
    )
    batches = [MicroBatchShape(1, 100)] * 3
    cost = model.scoring(batches)
    assert cost.time.busy["ranks"] == pytest.approx(sum(model.gather_seconds(3, 300)))
    assert cost.time.wait >= cost.time.busy["ranks"]
    assert cost.compute_seconds < model.each.scoring(batches).compute_seconds * 1.001
    words = [one for one in made.sentences if "compute all rows together" in one]
    assert len(words) == 1
    assert "1/2 of each of 56 products" in words[0]
    assert "in 448 messages" in words[0]  # eight micro-batches


def test_few_tokens_are_as_much_faster_as_there_are_drives(tmp_path: Path) -> None:
    few: dict[str, Any] = {"tokens_in_flight": 8, "micro_batch_tokens": 8}
    alone = planned(tmp_path, None, **few).choice.prediction
    few["device_memory"] = "256MiB"
    two = tensor_plan(tmp_path, RankGroup(2, 2), **few)[0].choice.prediction
    assert alone.binds == two.binds == "disk"
    assert alone.pass_seconds / two.pass_seconds == pytest.approx(2.0, rel=0.1)
    slow = CPU.model_copy(update={"network_bandwidth": 10**6})
    policy = Policy(**{**LOW, "ranks": "tensor"})
    bound = make_plan(tmp_path, policy, slow, Workload(), ranks=RankGroup(2, 2))
    assert bound.choice.prediction.binds == "ranks"
    assert any("wait for each other's rows" in one for one in bound.sentences)


def test_a_product_that_is_stored_by_columns_is_read_whole(tmp_path: Path) -> None:
    alone = planned(tmp_path, None, GPT2).choice.forecast
    made, _ = tensor_plan(tmp_path, RankGroup(2, 2), GPT2)
    own = made.choice.forecast
    stored = [
        sum(unit.stored_bytes for unit in one.shape.units) for one in (alone, own)
    ]
    assert stored[1] == pytest.approx(stored[0], rel=0.02)
    assert own.shape.streamed_bytes < 0.6 * alone.shape.streamed_bytes


def test_a_model_that_cannot_be_divided_says_so(tmp_path: Path) -> None:
    small = {**LLAMA, "hidden_size": 16, "intermediate_size": 16}
    small["num_attention_heads"] = 1
    with pytest.raises(UsageError, match="take ranks: pipeline"):
        tensor_plan(tmp_path, RankGroup(2), small)
    config = {**LLAMA, "num_kv_shared_layers": 2}
    made = planned(tmp_path, RankGroup(2), config, ranks="gather")
    way = ways_of(made)["tensor"]
    assert way.pass_seconds is None
    assert "its blocks share keys and values" in way.note
    assert made.devices is not None
    assert made.devices.switches == ()


def test_a_switch_is_where_the_times_cross() -> None:
    def few(tokens: int) -> float:
        return 0.01 * tokens

    def many(tokens: int) -> float:
        return 5.0 + 0.001 * tokens

    found = switch_of(("few", few), ("many", many))
    assert found.least == 1
    assert found.most == pytest.approx(5.0 / 0.009, rel=0.03)
    assert switch_of(("few", many), ("many", few)).most is None  # once it is faster
    never = switch_of(("few", lambda n: few(n) + 1.0), ("many", few))
    assert never.most == 0
    always = switch_of(("few", few), ("many", lambda n: few(n) + 1.0))
    assert (always.least, always.most) == (1, None)
    late = switch_of(("few", lambda n: few(n) if n > 99 else 9.0), ("many", many))
    assert late.least == pytest.approx(100, abs=2)
    assert late.most == found.most


@pytest.mark.parametrize(
    ("least", "most", "says"),
    [
        (1, 896, "tensor is faster up to 896 tokens a pass, gather above"),
        (2, 896, "from 2 to 896 tokens a pass, gather below and above"),
        (1, None, "tensor is faster than gather, however many"),
        (8, None, "from 8 tokens a pass on, gather below"),
        (1, 0, "gather is faster than tensor, however few"),
    ],
)
def test_a_switch_is_said_in_one_sentence(
    least: int, most: int | None, says: str
) -> None:
    switch = Switch("tensor", "gather", least, most)
    found = PassSwitch("passes", switch, 64, "tensor").sentence
    assert says in found
    assert found.endswith("the passes of this plan have 64: tensor")


def test_where_the_network_binds_the_switch_is_that_of_the_formula(
    tmp_path: Path,
) -> None:
    """Bytes of weights over bytes of outputs."""
    slow = CPU.model_copy(
        update={
            "network_bandwidth": 5 * 10**6,
            "disk": CPU.disk
            and CPU.disk.model_copy(update={"bandwidth": {"threads": 10**10}}),
        }
    )
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    policy = Policy(**{**LOW, "micro_batch_tokens": 4096, "tokens_in_flight": 4096})
    whole = make_plan(tmp_path, policy, slow, Workload()).planner
    group = RankGroup(2, 2)
    tensor = tensor_planner(tmp_path, whole, group)
    gather = gathering_planner(whole, group)
    choices = tensor.choose(), gather.choose()
    (ways,) = two_ways(
        (tensor, choices[0].policy, choices[0].forecast),
        (gather, choices[1].policy, choices[1].forecast),
    )
    hidden, wide = LLAMA["hidden_size"], LLAMA["intermediate_size"]
    expected = (4 * hidden**2 + 3 * hidden * wide) / (5 * hidden + 2 * wide)
    assert tensor.crossover_tokens == pytest.approx(expected, rel=0.01)
    assert ways.switch.most == pytest.approx(expected, rel=0.2)
    assert (ways.name, ways.switch.least) == ("passes", 1)
    assert (ways.faster(64), ways.faster(8192)) == ("tensor", "gather")


def test_the_plan_says_which_of_both_is_faster(tmp_path: Path) -> None:
    made = planned(tmp_path, RankGroup(2, 2))
    assert made.devices is not None
    (switch,) = made.devices.switches
    assert switch.num_tokens == LOW["tokens_in_flight"]
    assert "tokens a pass, gather above" in switch.sentence
    found = made.to_json()["devices"]["switches"]
    assert found == [switch.to_json()]
    gathering = planned(tmp_path, RankGroup(2, 2), ranks="gather")
    assert gathering.devices is not None
    assert gathering.devices.switches[0].num_tokens == 2 * LOW["tokens_in_flight"]


@pytest.mark.slow
def test_prompts_and_tokens_have_a_switch_each(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    work = Workload(Generate(max_new_tokens=8), 32)
    policy = Policy(
        ranks="tensor",
        device_memory="512MiB",
        sequences_in_flight=16,
        micro_batch_sequences=4,
    )
    made = make_plan(tmp_path, policy, CPU, work, ranks=RankGroup(2, 2))
    assert made.devices is not None
    prompts, tokens = made.devices.switches
    assert (prompts.passes, prompts.num_tokens) == ("prompt passes", 16 * 32)
    assert (tokens.passes, tokens.num_tokens) == ("token passes", 16)
    assert tokens.faster == "tensor"


def test_workers_read_the_drive_once_by_default(tmp_path: Path) -> None:
    once = ways_of(planned(tmp_path, RankGroup(2)))["a job each (--workers 2)"]
    each = ways_of(planned(tmp_path, RankGroup(2), io={"read_once": False}))[
        "a job each (--workers 2)"
    ]
    assert once.tokens_per_second
    assert each.tokens_per_second
    assert once.tokens_per_second == pytest.approx(2 * each.tokens_per_second, rel=0.1)
    assert "the drive is read once for all" in once.note
    assert f"({each.tokens_per_second:,.0f} a second if each reads all" in once.note
    assert "io.read_once: false: each worker reads all itself" in each.note
    cached = planned(tmp_path, RankGroup(2), io={"direct": False})
    assert "share the page cache" in ways_of(cached)["a job each (--workers 2)"].note


@pytest.mark.slow
def test_the_command_plans_for_ranks_that_divide_products(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    command = ["plan", str(tmp_path), "--ranks", "2", "--set", "ranks=tensor"]
    command += ["--set", "device_memory=256MiB"]
    shown = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert "Penstock, fastest" in shown.output
    assert "gather above; the passes of this plan have" in shown.output


def test_each_rank_has_a_part_of_the_experts(tmp_path: Path) -> None:
    heads, hidden = LLAMA["num_attention_heads"], LLAMA["hidden_size"]
    mixtral = {
        **MIXTRAL,
        "num_hidden_layers": 4,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_key_value_heads": heads,
    }
    assert ways_of(planned(tmp_path, RankGroup(2), mixtral))["tensor"].pass_seconds
    alone = planned(tmp_path, None, mixtral).choice.forecast.shape
    made, planner = tensor_plan(tmp_path, RankGroup(2, 2), mixtral)
    shape = made.choice.forecast.shape
    assert experts_of(shape) == [pytest.approx(one / 2) for one in experts_of(alone)]
    assert planner.flops_per_token(made.choice) == pytest.approx(alone.flops_per_token)
    model = planner.model_of(made.choice.policy, made.choice.forecast)
    assert sum(one.num for one in model.gathers) == 4 * (4 + 1)  # q, k, v, o, experts
    outputs = 4 * (4 * hidden + 2 * hidden)
    assert planner.output_bytes_per_token == outputs * shape.itemsize
    got = sum(one.bytes_per_token for one in model.gathers)
    assert got == pytest.approx(outputs * shape.itemsize / 2)
    assert any("and of the experts of 4 layers" in one for one in made.sentences)


def experts_of(shape: ModelShape) -> list[float]:
    """The FLOPs and the bytes of all experts."""
    sites = shape.sites
    flops = sum(site.expert_flops_per_token for site in sites)
    return [flops, sum(site.expert_weight_bytes for site in sites)]
