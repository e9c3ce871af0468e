"""Makes the documentation of all keys of a policy, from the policy's docstrings."""

from typing import Any

import yaml

from ..policy import Policy
from .extends import SHIPPED
from .values import AS_TEXT, exact_size

_EXTENDS = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    "description": "A policy file (relative to this one), the name of a shipped policy,"
    " or several of them in a list, of which the later win. What stands in this file"
    " wins over them; mappings are merged, and null takes out what they have.",
}
_HEAD = """# Policies

What to ask for on which machine, and what every key means. Take the one that is nearest
to yours by its name, and change what is different:

```
penstock score MODEL texts.jsonl -o scores.jsonl --policy {example}
penstock score MODEL texts.jsonl -o scores.jsonl --policy mine.yaml --set lookahead=3
penstock policy --policy mine.yaml    # what that makes, defaults and all
```

```yaml
# mine.yaml
extends: {example}
device_memory: 3GiB
```

Their figures are worked out from what makers state, not measured. The first line of
each lets editors check and explain keys (`policy.schema.json`).

| policy | for |
|---|---|
"""
_KINDS = {
    "boolean": "`true` or `false`",
    "integer": "number",
    "null": "null",
    "number": "number",
}
_SECTIONS = """
# Keys

Sizes are bytes or have a unit: `512MiB` (2**20 bytes each), `2GB` (10**9). A key that
is not there has its default. What contradicts itself, is unknown or is more than the
machine has is refused before anything is read, with its line and what to write.
"""


def policy_schema() -> dict[str, Any]:
    """The JSON schema of policy files, for editors."""
    found = Policy.model_json_schema()
    found["properties"] = {"extends": _EXTENDS, **found["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def policy_text(policy: Policy, *, is_whole: bool = True) -> str:
    """`policy` as YAML from which the same policy can be read: all of it, or only the
    keys that were set."""
    values = policy.model_dump(mode="json", context=AS_TEXT, exclude_unset=not is_whole)
    return str(yaml.safe_dump(values, sort_keys=False))


def reference_text() -> str:
    """The shipped policies and all keys, as Markdown."""
    schema = policy_schema()
    rows = [f"| `{name}` | {purpose} |\n" for name, purpose in _purposes().items()]
    head = _HEAD.replace("{example}", "laptop-16gb-ram-nvme") + "".join(rows)
    parts = [head, _SECTIONS, _section(schema, schema)]
    for name, part in schema["$defs"].items():
        (used,) = _keys_of(schema, name)
        title = f"\n## `{used}`\n\n{_one_line(part['description'])}\n"
        parts += [title, _section(part, schema)]
    return "".join(parts)


def _purposes() -> dict[str, str]:
    """What each shipped policy is for: the second line of its file."""
    found = {}
    for path in sorted(SHIPPED.glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        found[path.stem] = lines[1].removeprefix("# ")
    return found


def _keys_of(schema: dict[str, Any], section: str) -> list[str]:
    """The keys whose values are sections of the type `section`."""
    ref = f"#/$defs/{section}"
    found = []
    for name, field in schema["properties"].items():
        if field.get("$ref") == ref:
            found.append(name)
        elif field.get("type") == "object" and _each(field) == {"$ref": ref}:
            found.append(f"{name}.<tier>")
    return found


def _section(part: dict[str, Any], schema: dict[str, Any]) -> str:
    return "\n" + "".join(
        f"- **`{name}`** ({_takes(field, schema)}{_default(field)}): "
        f"{_meaning(field, schema)}\n"
        for name, field in part["properties"].items()
    )


def _takes(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """What values a key takes, in a few words."""
    if "enum" in field:
        words = [f"`{value}`" for value in field["enum"] if isinstance(value, str)]
        return _either(words)
    if "const" in field:
        return f"`{field['const']}`"
    if "anyOf" in field:
        return _either([_takes(one, schema) for one in field["anyOf"]])
    if "$ref" in field:
        return "keys, see below"
    if field["type"] == "object":
        return f"for each, {_takes(_each(field), schema)}"
    if field["type"] == "array":
        return "a list"
    if field["type"] == "integer" and "maximum" in field:
        return f"{field['minimum']} to {field['maximum']}"
    if "[0-9]" in field.get("pattern", ""):
        return "size"
    return _KINDS.get(field["type"], "text")


def _each(field: dict[str, Any]) -> dict[str, Any]:
    """The schema of the values of a mapping."""
    by_pattern = field.get("patternProperties", {})
    found: dict[str, Any] = field.get("additionalProperties") or {}
    return found or next(iter(by_pattern.values()))


def _either(words: list[str]) -> str:
    words = list(dict.fromkeys(words))
    if {"number", "size"} <= set(words):
        words.remove("number")
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _default(field: dict[str, Any]) -> str:
    default = field.get("default")
    if default is None or isinstance(default, dict):
        return ""
    is_size = any("pattern" in one for one in field.get("anyOf", []))
    if is_size and default != "auto":
        default = exact_size(default)
    if isinstance(default, bool):
        default = str(default).lower()
    return f"; default `{default}`"


def _meaning(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """The description of a key, or that of its section if it has none."""
    if "description" not in field:
        field = schema["$defs"][field["$ref"].rpartition("/")[2]]
    return _one_line(field["description"])


def _one_line(text: str) -> str:
    return " ".join(text.split())
