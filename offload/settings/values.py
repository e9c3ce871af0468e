"""The types of a policy's values: sizes, devices, tiers, expressions."""

import re
from typing import Annotated, Any, Literal

import regex
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializationInfo,
    WithJsonSchema,
)

from ...io.errors import PolicyError
from ...io.tier import Tier
from .marked_yaml import read_value

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
_MAX_BYTES = 1 << 63
"""All sizes are below this: byte counts are signed 64-bit numbers elsewhere."""


class Section(BaseModel):
    """A group of keys of a policy or of a machine file. Unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True
    )


def parse_setting(setting: str) -> tuple[str, Any]:
    """Splits `"key=value"` into the key and the value, which is YAML. Raises
    PolicyError."""
    key, equals, text = setting.partition("=")
    if not equals:
        raise PolicyError(f"{setting!r} is not a setting: write key=value")
    return key.strip(), read_value(text, f"--set {setting}")


def parse_bytes(value: int | str) -> int:
    """Bytes of `"2GiB"`, `"1.5 GB"` or a number. GiB is 2**30, GB is 10**9. Raises
    ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{value!r} is not a size: write 2GiB, 512MiB or a number")
    if isinstance(value, int):
        nbytes = value
    else:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", value)
        if match is None or match[2].upper() not in _UNITS:
            known = "B, KB, MB, GB, TB, KiB, MiB, GiB, TiB"
            raise ValueError(f"{value!r} is not a size: write 2GiB (units: {known})")
        found = float(match[1]) * _UNITS[match[2].upper()]
        nbytes = int(min(found, _MAX_BYTES))  # too many digits give infinity
    if nbytes <= 0:
        raise ValueError(f"{value!r} must be more than 0")
    if nbytes >= _MAX_BYTES:
        raise ValueError(
            "this is more than any machine has: write less than 8388608TiB"
        )
    return nbytes


def _bytes_or_auto(value: Any) -> Any:
    return value if value == "auto" else parse_bytes(value)


_NUMBER = {"type": "integer", "minimum": 1}
_AUTO = {"const": "auto"}
_SIZE = {
    "type": "string",
    "pattern": r"^\s*[0-9]*\.?[0-9]+\s*([KkMmGgTt][Ii]?)?[Bb]?\s*$",
}


def exact_size(nbytes: int) -> int | str:
    """The shortest value from which `parse_bytes` makes `nbytes`: 3 << 30 gives
    "3GiB"."""
    for text, unit in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes % (1 << unit) == 0:
            return f"{nbytes >> unit}{text}"
    for text, power in (("TB", 12), ("GB", 9), ("MB", 6)):
        if nbytes % 10**power == 0:
            return f"{nbytes // 10**power}{text}"
    return nbytes


def _shown(value: Any, info: SerializationInfo) -> Any:
    return exact_size(value) if info.context == AS_TEXT and value != "auto" else value


AS_TEXT = "sizes as text"
"""The serialization context in which sizes become text, for people."""
Bytes = Annotated[
    int,
    BeforeValidator(parse_bytes),
    PlainSerializer(_shown),
    WithJsonSchema({"anyOf": [_NUMBER, _SIZE]}),
]
AutoBytes = Annotated[
    int | Literal["auto"],
    BeforeValidator(_bytes_or_auto),
    PlainSerializer(_shown),
    WithJsonSchema({"anyOf": [_NUMBER, _SIZE, _AUTO]}),
]
AutoCount = Annotated[int, Field(ge=1), WithJsonSchema({"anyOf": [_NUMBER, _AUTO]})]
AutoLookahead = Annotated[
    int,
    Field(ge=0, le=8),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0, "maximum": 8}, _AUTO]}),
]

AutoExperts = Literal["device", "host"] | Annotated[int, Field(ge=1)]
"""Where experts are computed, or by how many tokens that is decided."""


def _on_or_off(value: Any) -> Any:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


AutoOnOff = Annotated[
    Literal["auto", "on", "off"],
    BeforeValidator(_on_or_off),  # YAML reads `on` as true
    WithJsonSchema({"enum": ["auto", "on", "off", True, False]}),
]

_DTYPE = r"^(auto|float(16|32|64)?|bfloat16|half|double|float8_\w+)$"


def _dtype(text: str) -> str:
    if re.fullmatch(_DTYPE, text) is None:
        raise ValueError(
            f"{text!r} is not a floating dtype: write auto, float32, bfloat16 or "
            "float16"
        )
    return text


DtypeName = Annotated[
    str, AfterValidator(_dtype), WithJsonSchema({"type": "string", "pattern": _DTYPE})
]

_DEVICE = r"^[a-z][a-z0-9_]*(:\d+)?$"
_USUAL = {"cpu", "cuda"}


def _device(text: str) -> str:
    if not _is_device(text):
        raise ValueError(f"{text!r} is not a device: write cpu, cuda or cuda:1")
    return text


def _is_device(text: str) -> bool:
    """Whether torch has a kind of devices of this name; there may be none of it."""
    if re.fullmatch(_DEVICE, text, re.ASCII) is None or text.startswith("cpu:"):
        return False
    kind = text.partition(":")[0]
    if kind in _USUAL:
        return True
    import torch  # takes a second, which usual names do not need

    try:
        torch.device(kind)
    except RuntimeError:
        return False
    return kind != "meta"


def _tier(text: str) -> str:
    if text not in set(Tier) and not _is_device(text):
        raise ValueError(
            f"{text!r} is not a tier: write {', '.join(Tier)} or a peer's name (cuda:1)"
        )
    return text


Pooling = Literal["auto", "mean", "cls", "last", "max"]
"""How one vector of a text is made from the vectors of its tokens."""
DeviceName = Annotated[
    str,
    AfterValidator(_device),
    WithJsonSchema({"type": "string", "pattern": _DEVICE}),
]


def _expression(text: str) -> str:
    try:
        regex.compile(text)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{text!r} is not a regular expression: {error}") from None
    return text


TierName = Annotated[
    str,
    AfterValidator(_tier),
    WithJsonSchema({"type": "string", "pattern": _DEVICE}),
]
Expression = Annotated[str, AfterValidator(_expression)]
