"""JSON objects that hold a checksum of themselves. Pure."""

import json
from collections.abc import Mapping
from typing import Any

import xxhash

_CHECKSUM = "checksum"


def sealed(values: Mapping[str, Any], *, indent: int | None = None) -> bytes:
    """`values` and their checksum as JSON: one line, or several with `indent`."""
    values = {**values, _CHECKSUM: _checksum(values)}
    return json.dumps(values, indent=indent).encode() + b"\n"


def unsealed(text: bytes) -> dict[str, Any]:
    """The values in `text`. Raises ValueError where they differ from what `sealed` was
    given."""
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    found = values.pop(_CHECKSUM, None)
    if found != _checksum(values):
        raise ValueError("its checksum is another one")
    return values


def _checksum(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True)
    return xxhash.xxh3_128(text.encode()).hexdigest()
