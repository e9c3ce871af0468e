"""What every section of a policy is made of, and how sizes are written."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, WithJsonSchema

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


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True
    )
