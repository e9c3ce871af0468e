"""The kinds of values that a policy's keys take: sizes, devices, tiers, expressions."""

import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, WithJsonSchema

from ..io.errors import PolicyError

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_setting(setting: str) -> tuple[str, Any]:
    """`"key=value"`: the key, and the value that YAML reads. Raises PolicyError."""
    key, equals, text = setting.partition("=")
    if not equals:
        raise PolicyError(f"{setting!r} is no setting: write key=value")
    try:
        return key.strip(), yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise PolicyError(f"{setting!r}: no YAML: {problem}") from None


def parse_bytes(value: int | str) -> int:
    """`"2GiB"`, `"1.5 GB"` or a number of bytes. GiB is 2**30, GB is 10**9."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{value!r} is no size: write 2GiB, 512MiB or a number")
    if isinstance(value, int):
        nbytes = value
    else:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", value)
        if match is None or match[2].upper() not in _UNITS:
            known = "B, KB, MB, GB, TB, KiB, MiB, GiB, TiB"
            raise ValueError(f"{value!r} is no size: write 2GiB (units: {known})")
        nbytes = int(float(match[1]) * _UNITS[match[2].upper()])
    if nbytes <= 0:
        raise ValueError(f"{value!r} must be more than nothing")
    return nbytes


def _bytes_or_auto(value: Any) -> Any:
    return value if value == "auto" else parse_bytes(value)


_SIZE_SCHEMA = {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}]}
Bytes = Annotated[int, BeforeValidator(parse_bytes), WithJsonSchema({**_SIZE_SCHEMA})]
AutoBytes = Annotated[
    int | Literal["auto"],
    BeforeValidator(_bytes_or_auto),
    WithJsonSchema({**_SIZE_SCHEMA}),
]


_DEVICE = r"^(cpu|cuda(:\d+)?)$"


def _device(text: str) -> str:
    if re.fullmatch(_DEVICE, text) is None:
        raise ValueError(f"{text!r} is no device: write cpu, cuda or cuda:1")
    return text


def _tier(text: str) -> str:
    if text not in TIERS and re.fullmatch(_DEVICE, text) is None:
        raise ValueError(
            f"{text!r} is no tier: write {', '.join(TIERS)} or a peer's name (cuda:1)"
        )
    return text


TIERS = ("device", "peer", "host", "disk")
DeviceName = Annotated[
    str,
    AfterValidator(_device),
    WithJsonSchema({"type": "string", "pattern": _DEVICE}),
]


def _expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from None
    return text


TierName = Annotated[
    str,
    AfterValidator(_tier),
    WithJsonSchema(
        {"type": "string", "pattern": r"^(device|peer|host|disk|cpu|cuda(:\d+)?)$"}
    ),
]
Expression = Annotated[str, AfterValidator(_expression)]
