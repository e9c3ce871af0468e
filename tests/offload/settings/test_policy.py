"""Policies: units, unknown keys, YAML, settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock import Policy
from penstock.io.errors import PolicyError
from penstock.offload.settings.values import parse_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("2GiB", 2 << 30),
        ("2 GB", 2 * 10**9),
        ("1.5 MiB", 3 << 19),
        ("512", 512),
        (4096, 4096),
        ("1kib", 1024),
    ],
)
def test_sizes_have_units(text: str | int, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["2 Gigs", "GiB", "-1GiB", 0, "", True, 1.5])
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(PolicyError, match="device_memory"):
        Policy(device_memory=text)


def test_an_unknown_key_lists_the_known_ones() -> None:
    with pytest.raises(
        PolicyError, match=r"'divice' .did you mean 'device'.*known: device"
    ):
        Policy(divice="cpu")
    with pytest.raises(PolicyError, match=r"mean 'io.threads'.*known: reader, th"):
        Policy(io={"thread": 2})


def test_a_policy_is_read_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("device_memory: 1GiB\nio:\n  threads: 3\n")
    policy = Policy.from_yaml(path)
    assert policy.device_memory == 1 << 30
    assert policy.io.threads == 3
    assert policy.tokens_in_flight == Policy().tokens_in_flight


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "device_memory: much\n"])
def test_a_bad_policy_file_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(PolicyError, match=r"policy\.yaml"):
        Policy.from_yaml(path)


def test_settings_win_over_the_file() -> None:
    policy = Policy(device_memory="1GiB").with_settings(
        ["device_memory=2GiB", "io.threads=4", "strict=true"]
    )
    assert (policy.device_memory, policy.io.threads, policy.strict) == (
        2 << 30,
        4,
        True,
    )
    with pytest.raises(PolicyError, match="key=value"):
        policy.with_settings(["strict"])
    with pytest.raises(PolicyError, match="no keys below"):
        policy.with_settings(["strict.very=true"])
    with pytest.raises(PolicyError, match=r"^--set placement=\{a:1:3: not valid YAML"):
        policy.with_settings(["placement={a"])


def test_tiers_are_set_from_the_command_line_too() -> None:
    policy = Policy(placement={"head": "disk"}).with_settings(
        [
            "peer.cuda:1=4GiB",
            "links.host.bandwidth=1GB",
            "links.host.latency=0.001",
            r"placement={layers\.1\b: peer}",
        ]
    )
    assert policy.peer == {"cuda:1": 4 << 30}
    assert policy.links["host"].bandwidth == 10**9
    assert policy.links["host"].latency == 0.001
    assert policy.placement == {r"layers\.1\b": "peer"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"device": "gpu"}, "device: 'gpu' is not a device: write cpu, cuda or cuda:1"),
        ({"device": "cuda\n"}, "is not a device: write cpu"),
        ({"device": "cuda:"}, "device: 'cuda:' is not a device"),
        ({"device": 0}, "device: Input should be a valid string .got 0"),
        ({"peer": {"gpu": 1}}, "peer.gpu: 'gpu' is not a device: write cpu, cuda or"),
        ({"peer": {"cuda:1": "all"}}, "peer.cuda:1: 'all' is not a size: write 2GiB"),
        ({"peer": ["cuda:1"]}, "peer: Input should be a valid dictionary"),
        (
            {"placement": {"head": "gpu"}},
            "placement.head: 'gpu' is not a tier: write device, peer, host, disk or a "
            "peer's name",
        ),
        ({"placement": {"(": "host"}}, r"'\(' is not a regular expression: missing \)"),
        ({"placement": {1: "host"}}, "placement.1: Input should be a valid string"),
        ({"links": {"gpu": {"bandwidth": 1}}}, "'peer', 'host' or 'disk' .got 'gpu'"),
        ({"links": {"host": {"bandwidth": 0}}}, "links.host.bandwidth: 0 must be more"),
        ({"links": {"host": {}}}, "links.host.bandwidth: Field required"),
        (
            {"links": {"host": {"bandwidth": 1, "latncy": 1}}},
            r"unknown key 'links.host.latncy' .did you mean 'links.host.latency'\?.; "
            "known: bandwidth, latency",
        ),
        (
            {"links": {"host": {"bandwidth": 1, "latency": -1}}},
            "links.host.latency: Input should be greater than or equal to 0 .got -1",
        ),
        (
            {"links": {"host": {"bandwidth": 1, "latency": float("inf")}}},
            "links.host.latency: Input should be a finite number .got inf",
        ),
    ],
)
def test_what_is_no_tier_device_or_link_is_named_with_what_would_be_one(
    values: dict[str, object], message: str
) -> None:
    with pytest.raises(PolicyError, match=message):
        Policy(**values)


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:12"])
def test_devices_are_known_by_torchs_names(name: str) -> None:
    policy = Policy(device="cpu", peer={name: 1}, placement={"": name})
    assert policy.placement[""] == Policy(device=name).device == name


def test_every_field_is_documented_in_the_schema() -> None:
    schema = Policy.model_json_schema()
    nested = schema["$defs"]["IO"]["properties"]
    link = schema["$defs"]["LinkPolicy"]["properties"]
    assert schema["properties"]["device"]["pattern"] == r"^[a-z][a-z0-9_]*(:\d+)?$"
    for name, field in {**schema["properties"], **nested, **link}.items():
        field = schema["$defs"]["IO"] if "$ref" in field else field
        assert field.get("description"), f"{name} has no description"


def test_policies_are_immutable() -> None:
    policy = Policy()
    with pytest.raises(ValueError, match="frozen"):
        policy.strict = True
