"""Policy files: what is wrong is named with file, line, limit and fix; files extend
each other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from nets import Net, make
from penstock import Policy, wrap
from penstock.io.errors import MachineError, PolicyError
from penstock.offload.settings.contradictions import without_effect
from penstock.offload.settings.extends import shipped
from penstock.offload.settings.installed import Installed, over_budget
from penstock.offload.settings.marked_yaml import read_yaml

GIB = 1 << 30


def write(folder: Path, text: str, name: str = "policy.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def problems_of(path: Path, *settings: str) -> list[str]:
    """Without the folder, one sentence each."""
    with pytest.raises(PolicyError) as caught:
        Policy.from_yaml(path, settings)
    return str(caught.value).replace(f"{path.parent}/", "").split("\n")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "device: cpu\n\ndevice_memry: 1GiB\n",
            "policy.yaml:3:1: unknown key 'device_memry' (did you mean "
            "'device_memory'?); known: device, dtype, memory, ",
        ),
        (
            "reader: libaio\n",
            "policy.yaml:1:1: unknown key 'reader' (did you mean 'io.reader'?); known:",
        ),
        (
            "io:\n  threads: 4\n  thread: 4\n",
            "policy.yaml:3:3: unknown key 'io.thread' (did you mean 'io.threads'?)",
        ),
        (
            "host_memory: 4 Gigs\n",
            "policy.yaml:1:14: host_memory: '4 Gigs' is not a size: write 2GiB (units",
        ),
        (
            "io:\n  threads: 400\n",
            "policy.yaml:2:12: io.threads: Input should be less than or equal to 64 "
            "(got 400)",
        ),
        (
            "strict: maybe\n",
            "policy.yaml:1:9: strict: Input should be a valid boolean, unable to",
        ),
        (
            "dtype: float33\n",
            "policy.yaml:1:8: dtype: 'float33' is not a floating dtype: write auto, fl",
        ),
        (
            "links:\n  host: {latency: 1}\n",
            "policy.yaml:2:3: links.host.bandwidth: Field required",
        ),
        (
            "device: cpu\nio:\n  depth: 4\ndevice: cuda\n",
            "policy.yaml:4:1: 'device' is here a second time, after line 1; take",
        ),
        (
            "io:\n  depth: 4\n  depth: 5\n",
            "policy.yaml:3:3: 'depth' is here a second time, after line 2",
        ),
        ("device: [1\n", "policy.yaml:2:1: not valid YAML: "),
        ("- device\n", "policy.yaml:1:1: must hold keys and values, not a list or"),
        ("? [a, b]\n: 1\n", "policy.yaml:1:3: a key must be a word, not a list"),
        ("io: &a\n  threads: *a\n", "policy.yaml:1:5: this value is a part of itself"),
        (
            "device: !!python/name:os.system\n",
            "policy.yaml:1:9: not valid YAML: could",
        ),
    ],
)
def test_what_is_wrong_is_named_with_line_and_column(
    text: str, problem: str, tmp_path: Path
) -> None:
    (found,) = problems_of(write(tmp_path, text))
    assert found.startswith(problem)


def test_all_that_is_wrong_is_said_at_once_a_sentence_each(tmp_path: Path) -> None:
    path = write(tmp_path, "device: gpu\nio:\n  chunk: much\n")
    found = problems_of(path, "kv.tier=tape")
    assert [line.split(": ")[0] for line in found] == [
        "policy.yaml:1:9",
        "--set kv.tier=tape",
        "policy.yaml:3:10",
    ]


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"placement": {"head": "host"}}, "'host', which has room for 0: set host_memory"),
    ({"placement": {"head": "peer"}}, "'peer', which has room for 0: set peer, such"),
    (
        {"placement": {"head": "cuda:2"}, "peer": {"cuda:1": 1}},
        "'cuda:2', which has room for 0: set peer.cuda:2, or name another tier",
    ),
    (
        {"device": "cuda:0", "peer": {"cuda:0": 1}},
        "peer.cuda:0 is the device that computes",
    ),
    ({"host_shared": True}, "set host_memory, or leave host_shared out"),
    ({"compile": True, "coalesce": "on"}, "set coalesce: auto, or compile: false"),
    ({"kv": {"limits": {"host": 1}}}, "set kv.tier to device, host or disk"),
    ({"kv": {"staging_memory": 1}}, "kv.staging_memory has no effect while kv.tier"),
    (
        {"kv": {"tier": "host", "limits": {"device": 1}}},
        "kv.limits.device is never reached",
    ),
    (
        {"micro_batch_tokens": 512, "tokens_in_flight": 256},
        "set micro_batch_tokens to at most 256, or tokens_in_flight to at least 512",
    ),
    (
        {"micro_batch_sequences": 9, "sequences_in_flight": 8},
        "set micro_batch_sequences to at most 8",
    ),
]


@pytest.mark.parametrize(("values", "message"), CONTRADICTIONS)
def test_keys_that_contradict_each_other_are_refused_at_once(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(PolicyError) as caught:
        Policy(**values)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"placement": {"head": "host"}, "host_memory": 1},
        {"placement": {"head": "peer"}, "peer": {"cuda:1": 1}},
        {"placement": {"head": "cuda:1"}, "peer": {"cuda:1": 1}},
        {"device": "cpu", "peer": {"cpu": 1}},
        {"host_shared": True, "host_memory": 1},
        {"compile": True, "coalesce": "auto"},
        {"kv": {"tier": "host", "limits": {"host": 1, "disk": 1}}},
        {"kv": {"dtype": "int8", "limits": {"device": 1}}},
        {"tokens_in_flight": 256},
        {"micro_batch_sequences": 8, "sequences_in_flight": 8},
    ],
)
def test_what_only_looks_like_a_contradiction_is_let_through(
    values: dict[str, Any],
) -> None:
    Policy(**values)


def test_a_contradiction_names_both_places(tmp_path: Path) -> None:
    path = write(tmp_path, "compile: true\n\ncoalesce: on\n")
    (found,) = problems_of(path)
    assert found.startswith("policy.yaml:1:10 and policy.yaml:3:11: compile: true and")
    (found,) = problems_of(write(tmp_path, "compile: true\n"), "coalesce=on")
    assert found.startswith("policy.yaml:1:10 and --set coalesce=on: compile: true")
    assert not Policy.from_yaml(path, ["compile=false"]).compile  # which mends it


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pinned_memory": 1}, "pinned_memory has no effect"),
        ({"activations": "host"}, "activations: host saves nothing"),
        ({"staging_memory": 1}, "staging_memory has no effect"),
        ({"links": {"peer": {"bandwidth": 1}}}, "links.peer has no effect"),
        ({"links": {"host": {"bandwidth": 1}}}, "links.host has no effect"),
    ],
)
def test_what_has_no_effect_is_announced(values: dict[str, Any], message: str) -> None:
    (found,) = without_effect(Policy(**values))
    assert found.startswith(message)
    on_gpu = {"device": "cuda", "peer": {"cuda:1": 1}, "host_memory": 1}
    assert without_effect(Policy(**{**values, **on_gpu})) == []
    assert without_effect(Policy()) == []


SMALL = Installed(
    host_bytes=8 * GIB, disk_bytes=100 * GIB, gpu_bytes={"cuda:0": 16 * GIB}
)


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ({"host_memory": "9GiB"}, [("host_memory",)]),
        ({"device_memory": "9GiB"}, [("device_memory",)]),
        ({"pinned_memory": "9GiB"}, [("pinned_memory",)]),
        ({"peer": {"cpu": "9GiB"}}, [("peer", "cpu")]),
        ({"device": "cuda:0", "staging_memory": "9GiB"}, [("staging_memory",)]),
        ({"device": "cuda:0", "device_memory": "17GiB"}, [("device_memory",)]),
        ({"peer": {"cuda:0": "17GiB"}}, [("peer", "cuda:0")]),
        (
            {"kv": {"tier": "host", "limits": {"host": "9GiB", "disk": "101GiB"}}},
            [("kv", "limits", "host"), ("kv", "limits", "disk")],
        ),
        (
            {"device_memory": "5GiB", "host_memory": "4GiB"},
            [("host_memory",), ("device_memory",)],
        ),
        (
            {"device": "cuda", "activations": "host", "activation_memory": "9GiB"},
            [("activation_memory",)],
        ),
    ],
)
def test_a_budget_over_what_the_machine_has_is_named(
    values: dict[str, Any], keys: list[tuple[str, ...]]
) -> None:
    found = over_budget(Policy(**values), SMALL)
    assert [key for problem in found for key in problem.keys] == keys


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"device_memory": "4GiB", "host_memory": "4GiB", "pinned_memory": "8GiB"},
        {"device": "cuda:0", "device_memory": "16GiB", "host_memory": "8GiB"},
        {"device": "cuda:3", "device_memory": "99GiB"},  # not there: said elsewhere
        {"device": "cuda:0", "activation_memory": "9GiB"},
    ],
)
def test_what_the_machine_has_is_no_problem(values: dict[str, Any]) -> None:
    assert over_budget(Policy(**values), SMALL) == []


def test_a_machine_that_has_less_is_named_with_the_line_and_ends_with_3(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, "device: cpu\nhost_memory: 90000GiB\n")
    with pytest.raises(MachineError) as caught:
        wrap(make(Net), Policy.from_yaml(path))
    assert caught.value.exit_code == 3
    said = str(caught.value)
    assert said.startswith(f"{path}:2:14: host_memory of 87.9 TiB is more than")
    assert "set it to less than that (" in said


def test_a_file_extends_others_and_wins(tmp_path: Path) -> None:
    write(tmp_path, "device_memory: 1GiB\nio: {threads: 3, depth: 5}\n", "one.yaml")
    write(tmp_path, "extends: one.yaml\nstrict: true\nio: {depth: 6}\n", "two.yml")
    (tmp_path / "below").mkdir()
    path = write(
        tmp_path / "below",
        "extends: [../one.yaml, ../two.yml]\nio:\n  chunk: 1MiB\nstrict: false\n",
    )
    policy = Policy.from_yaml(path, ["io.max_gap=1"])
    assert policy.device_memory == GIB
    assert (policy.io.threads, policy.io.depth, policy.io.chunk) == (3, 6, 1 << 20)
    assert (policy.strict, policy.io.max_gap) == (False, 1)
    assert policy == Policy(
        device_memory=GIB,
        io={"threads": 3, "depth": 6, "chunk": 1 << 20, "max_gap": 1},
    )


def test_rules_come_before_those_of_what_is_extended(tmp_path: Path) -> None:
    """The first that matches counts."""
    write(
        tmp_path,
        "host_memory: 1GiB\nplacement: {head: host, layers: device}\n",
        "base.yaml",
    )
    text = "extends: base.yaml\nplacement: {'layers.1': disk, head: disk}\n"
    policy = Policy.from_yaml(write(tmp_path, text))
    assert list(policy.placement.items()) == [
        ("layers.1", "disk"),
        ("head", "disk"),
        ("layers", "device"),
    ]


def test_null_takes_out_what_was_inherited(tmp_path: Path) -> None:
    write(tmp_path, "host_memory: 1GiB\nio: {threads: 7, depth: 9}\n", "base.yaml")
    text = "extends: base.yaml\nhost_memory: null\nio: {threads: null}\n"
    path = write(tmp_path, text)
    policy = Policy.from_yaml(path)
    assert policy.host_memory is None
    assert (policy.io.threads, policy.io.depth) == (Policy().io.threads, 9)
    assert Policy.from_yaml(path, ["io=null"]) == Policy()


def test_an_error_names_the_file_that_it_stands_in(tmp_path: Path) -> None:
    write(tmp_path, "\nio: {thread: 4}\n", "base.yaml")
    (found,) = problems_of(write(tmp_path, "extends: base.yaml\nio: {depth: 4}\n"))
    assert found.startswith("base.yaml:2:6: unknown key 'io.thread'")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("extends: other.yaml\n", "other.yaml:1:10: extends is circular (policy"),
        ("extends: policy.yaml\n", "policy.yaml:1:10: extends is circular (policy"),
        ("\nextends: no.yaml\n", "policy.yaml:2:10: there is no no.yaml to extend: w"),
        ("extends: nobody\n", "policy.yaml:1:10: there is no nobody to extend: write"),
        ("extends: 3\n", "policy.yaml:1:10: extends 3: write a file, or one of these:"),
    ],
)
def test_what_cannot_be_extended_is_named(
    text: str, problem: str, tmp_path: Path
) -> None:
    write(tmp_path, "extends: [policy.yaml]\n", "other.yaml")
    (found,) = problems_of(write(tmp_path, text))
    assert found.startswith(problem)
    if "circular" in problem:
        assert "-> policy.yaml); take one of them out" in found
    else:
        assert ", ".join(shipped()) in found


def test_a_policy_is_extended_by_two_ways_to_it(tmp_path: Path) -> None:
    """That is not circular."""
    write(tmp_path, "strict: true\n", "base.yaml")
    write(tmp_path, "extends: base.yaml\n", "one.yaml")
    write(tmp_path, "extends: base.yaml\n", "two.yaml")
    assert Policy.from_yaml(write(tmp_path, "extends: [one.yaml, two.yaml]\n")).strict


def test_yaml_may_repeat_itself_by_name(tmp_path: Path) -> None:
    text = (
        "links:\n  disk: &slow {bandwidth: 1MB}\n  peer: *slow\n"
        "  host:\n    <<: *slow\n    latency: 1.0\n"
    )
    links = Policy.from_yaml(write(tmp_path, text)).links
    assert {link.bandwidth for link in links.values()} == {10**6}
    assert (links["host"].latency, links["disk"].latency) == (1.0, 0.0)


COUNTS = ("lookahead", "micro_batch_tokens", "tokens_in_flight")


@pytest.mark.parametrize("name", [*COUNTS, "sequences_in_flight"])
def test_a_count_that_is_auto_is_what_it_is_without_the_key(
    name: str, tmp_path: Path
) -> None:
    policy = Policy(**{name: "auto"})
    assert policy == Policy()
    assert name not in policy.model_fields_set
    write(tmp_path, f"{name}: 3\n", "base.yaml")
    path = write(tmp_path, f"extends: base.yaml\n{name}: auto\n")
    assert Policy.from_yaml(path) == Policy()


def test_a_policy_is_what_it_asks_for_wherever_that_was_written(tmp_path: Path) -> None:
    policy = Policy.from_yaml(write(tmp_path, "device_memory: 1GiB\n"))
    assert policy == Policy(device_memory=GIB)
    assert policy.with_settings(["device_memory=2GiB"]) == Policy(device_memory="2GiB")


def _doubling(pattern: str) -> str:
    """Nine levels, each of which says the one before ten times."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    for last, this in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{this}: &{this} " + pattern.format(",".join([f"*{last}"] * 10)))
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_doubling("[{}]"), "more than 16 aliases"),
        (_doubling("{{<<: [{}]}}"), "more than 16 aliases"),
        ("a: &a [" + "1," * 2000 + "]\nb: [" + "*a," * 15 + "]", "by their aliases"),
        ("device: " + "[" * 50_000, "more than 32 nested levels"),
        ("device: " + "{b: " * 3_000, "more than 32 nested levels"),
        ("device: [" + "1," * 30_000 + "]", "more than 20000 keys and values"),
        (
            "dtype: 2024-13-45\n",
            "policy.yaml:1:8: not valid YAML: month must be in",
        ),
        (
            "strict: !!int abc\n",
            "policy.yaml:1:9: not valid YAML: invalid literal",
        ),
        ("device: \0\n", "not valid YAML"),
        ("device_memory: " + "9" * 5_000 + "\n", "policy.yaml:1:16: not valid YAML"),
        ("device_memory: " + "9" * 400 + "GiB\n", "more than any machine has"),
        ("device_memory: " + "9" * 400 + "\n", "more than any machine has"),
        ("device: '\\e[2Jcpu\\u202e'".replace("'", '"'), r"\\x1b\[2Jcpu\\u202e"),
    ],
)
def test_a_hostile_policy_is_one_short_sentence(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(PolicyError, match=message) as caught:
        Policy.from_yaml(path)
    said = str(caught.value)
    assert len(said) < 2_000
    assert said.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    "setting", ["dtype=2024-13-45", "io=" + "[" * 20_000, "strict=\0", "a\0.b=1"]
)
def test_a_hostile_setting_is_one_short_sentence(setting: str) -> None:
    with pytest.raises(PolicyError) as caught:
        Policy().with_settings([setting])
    assert len(str(caught.value)) < 2_000
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("place", ["/dev/zero", "pipe.yaml", "folder", "a\0b", "long"])
def test_only_a_regular_file_of_some_length_is_a_policy(
    place: str, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder").mkdir()
    (tmp_path / "long").write_text("# " + "x" * (1 << 20))
    with pytest.raises(
        PolicyError, match=r"regular file|is not a file name|has more than"
    ):
        Policy.from_yaml(tmp_path / place)


def test_a_file_that_is_extended_in_many_ways_is_read_once(tmp_path: Path) -> None:
    for level in range(24):
        below = f"{level + 1}.yaml"
        (tmp_path / f"{level}.yaml").write_text(f"extends: [{below}, {below}]\n")
    (tmp_path / "24.yaml").write_text("lookahead: 3\n")
    assert Policy.from_yaml(tmp_path / "0.yaml").lookahead == 3


def test_what_extends_hundreds_of_files_is_refused(tmp_path: Path) -> None:
    for level in range(200):
        (tmp_path / f"{level}.yaml").write_text(f"extends: {level + 1}.yaml\n")
    with pytest.raises(PolicyError, match="more than 32 files"):
        Policy.from_yaml(tmp_path / "0.yaml")


def test_brackets_without_end_are_refused_before_they_are_parsed() -> None:
    with pytest.raises(PolicyError, match="more than 32 nested levels"):
        read_yaml("placement: " + "[" * 200_000, "it")


def test_a_name_that_is_too_long_is_no_file_to_extend(tmp_path: Path) -> None:
    path = tmp_path / "long.yaml"
    path.write_text(f"extends: {'x' * 5_000}")
    with pytest.raises(PolicyError, match=r"there is no .* to extend") as caught:
        Policy.from_yaml(path)
    assert len(str(caught.value)) < 2_000
    with pytest.raises(PolicyError, match="too long"):
        Policy.from_yaml("9" * 5_000)
