"""Decides whose code may run: that of transformers and Penstock, and other code only if
the policy says so.

The files of a checkpoint may name Python files beside them (`auto_map`), kernels on a
hub (`attn_implementation: someone/kernel`), or other files to read instead of
themselves. All of that is checked here, before transformers sees it.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...io.errors import CheckpointError
from ...io.regular_file import MAX_CONFIG_BYTES, read_json_object
from . import aliases

_KERNELS = {
    "attn_implementation": {"eager", "sdpa", "flex_attention", "paged|eager"},
    "experts_implementation": {"eager", "batched_mm", "grouped_mm"},
}
"""The values that are transformers' and torch's own, for each key that may name other
code."""
_READ_WHOLE = {
    ".json": 256 << 20,  # tokenizer.json: the longest are tens of megabytes
    ".jinja": MAX_CONFIG_BYTES,
    ".txt": 256 << 20,
    ".model": 256 << 20,
}
"""The files that transformers reads whole, by suffix, and the most bytes that they may
have."""
TRUST = (
    "set trust_remote_code: true (--trust-remote-code) if you have read that code and "
    "trust it"
)


def loading(is_trusted: bool) -> dict[str, bool]:
    """Options for every `from_pretrained`: nothing is asked or downloaded, and code of
    the checkpoint runs only if it is trusted."""
    return {"trust_remote_code": is_trusted, "local_files_only": True}


def check_files(folder: Path) -> None:
    """Raises CheckpointError if a library would read without end.

    That is a pipe or device under any name, or a huge file with a name that is read
    whole.
    """
    for directory in (folder, folder / "additional_chat_templates"):
        try:
            with os.scandir(directory) as found:
                paths = [Path(entry.path) for entry in found]
        except OSError:
            continue  # whoever needs it reports that it is missing
        for path in paths:
            _check_file(path, _READ_WHOLE.get(path.suffix))


def _check_file(path: Path, most_bytes: int | None) -> None:
    try:
        found = path.stat()
    except OSError:
        return
    if stat.S_ISDIR(found.st_mode):
        return
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"cannot read {path}: it is not a regular file")
    if most_bytes is not None and found.st_size > most_bytes:
        raise CheckpointError(
            f"{path} has {found.st_size:,} bytes, which is not a file of its kind (at "
            f"most {most_bytes:,})"
        )


def read_config(folder: Path, *, is_trusted: bool) -> dict[str, Any]:
    """The content of config.json. Raises CheckpointError if it is not an object, and
    for kernels of others that are not trusted."""
    values = read_json_object(folder / "config.json")
    if "configuration_files" in values:
        raise CheckpointError(
            f"{folder}/config.json names other files to be read instead "
            "(configuration_files): put the one that is meant in its place"
        )
    if not is_trusted:
        is_renamed = aliases.is_renamed(values)
        _check_kernels(folder, aliases.renamed(values) if is_renamed else values)
    return values


def _check_kernels(folder: Path, values: Mapping[str, Any]) -> None:
    for key, value in all_of(values):
        own = _KERNELS.get(key.lstrip("_").removesuffix("_internal"))
        if own is None or value is None:
            continue
        names = value.values() if isinstance(value, dict) else [value]
        for name in names:
            if name is not None and name not in own:
                raise CheckpointError(
                    f"{folder}/config.json asks for code from elsewhere ({key}: "
                    f"{name!r:.100}), which is not run: take the key out, or {TRUST}"
                )


def own_code(values: Mapping[str, Any]) -> str | None:
    """The code that the file of these `values` names; None if it names none."""
    found = values.get("auto_map")
    if not found:
        return None
    if isinstance(found, dict):
        return ", ".join(map(str, found.values()))
    return str(found)


def refuse_code(path: Path, code: str) -> CheckpointError:
    """The error that only the checkpoint's own code could load it."""
    return CheckpointError(
        f"{path} needs code that comes with the checkpoint (auto_map: {code[:200]}), "
        "which is not run, and transformers has nothing of its own in its place: "
        f"{TRUST}"
    )


def unused_code(folder: Path) -> tuple[str, ...]:
    """What to announce about the checkpoint's own `generate`, which Penstock does not
    use."""
    name = "custom_generate/generate.py"
    if not (folder / name).exists():
        return ()
    return (
        f"{folder} brings its own way to complete prompts ({name}), which is not used: "
        "they are completed as transformers does it",
    )


def without_code(config: Any) -> None:
    """Removes the names of code from a config and the configs in it.

    The classes of a composite model are looked up by them, even if the whole is not
    trusted.
    """
    config.__dict__.pop("auto_map", None)
    for value in list(config.__dict__.values()):
        if hasattr(value, "sub_configs"):
            without_code(value)


def all_of(values: Any) -> Iterator[tuple[str, Any]]:
    """All keys in `values`, at any depth, with their values."""
    open_ = [values]
    while open_:
        found = open_.pop()
        if isinstance(found, dict):
            yield from found.items()
            open_ += found.values()
        elif isinstance(found, list):
            open_ += found
