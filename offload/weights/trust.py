"""Whose code runs: transformers' and ours, and nobody else's unless the policy says so.

A checkpoint's files may name Python files beside them (`auto_map`), kernels on a hub
(`attn_implementation: someone/kernel`), or another file to read instead of themselves.
All of that is looked at here, before transformers is.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...io.errors import CheckpointError
from ...io.regular_file import MAX_CONFIG_BYTES, read_json_object

_KERNELS = {
    "attn_implementation": {"eager", "sdpa", "flex_attention", "paged|eager"},
    "experts_implementation": {"eager", "batched_mm", "grouped_mm"},
}
"""Of each key that may name code elsewhere: what is transformers' and torch's own."""
_READ_WHOLE = {
    ".json": 256 << 20,  # tokenizer.json: the longest are tens of megabytes
    ".jinja": MAX_CONFIG_BYTES,
    ".txt": 256 << 20,
    ".model": 256 << 20,
}
"""What transformers reads whole of a folder, by suffix, and its most bytes."""
TRUST = (
    "set trust_remote_code: true (--trust-remote-code) if you have read that code and "
    "trust it"
)


def loading(is_trusted: bool) -> dict[str, bool]:
    """Options of every `from_pretrained`: nothing is asked, nothing is downloaded, and
    code of the checkpoint's own runs only where it is trusted."""
    return {"trust_remote_code": is_trusted, "local_files_only": True}


def check_files(folder: Path) -> None:
    """Raises CheckpointError where a library would read without end: for a pipe or a
    device under any name, and for a huge file under that of a file with settings."""
    for directory in (folder, folder / "additional_chat_templates"):
        try:
            with os.scandir(directory) as found:
                paths = [Path(entry.path) for entry in found]
        except OSError:
            continue  # who needs it says that it is not there
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
        raise CheckpointError(f"cannot read {path}: it is no regular file")
    if most_bytes is not None and found.st_size > most_bytes:
        raise CheckpointError(
            f"{path} has {found.st_size:,} bytes, which is no file of its kind (at "
            f"most {most_bytes:,})"
        )


def read_config(folder: Path, *, is_trusted: bool) -> dict[str, Any]:
    """What config.json says, as it stands there. Raises CheckpointError for what is no
    object, and for kernels of others that are not trusted."""
    values = read_json_object(folder / "config.json")
    if "configuration_files" in values:
        raise CheckpointError(
            f"{folder}/config.json names other files to be read instead "
            "(configuration_files): put the one that is meant in its place"
        )
    if not is_trusted:
        _check_kernels(folder, values)
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
    """The code that a file of settings brings along, as it says it; None for none."""
    found = values.get("auto_map")
    if not found:
        return None
    if isinstance(found, dict):
        return ", ".join(map(str, found.values()))
    return str(found)


def refuse_code(path: Path, code: str) -> CheckpointError:
    """What is said where only the checkpoint's own code would do."""
    return CheckpointError(
        f"{path} needs code that comes with the checkpoint (auto_map: {code[:200]}), "
        "which is not run, and transformers has nothing of its own in its place: "
        f"{TRUST}"
    )


def unused_code(folder: Path) -> tuple[str, ...]:
    """What is announced of code that transformers would complete prompts with, and
    Penstock does not."""
    name = "custom_generate/generate.py"
    if not (folder / name).exists():
        return ()
    return (
        f"{folder} brings its own way to complete prompts ({name}), which is not used: "
        "they are completed as transformers does it",
    )


def without_code(config: Any) -> None:
    """Takes out of a config, and of those in it, what names code beside it: the classes
    of a composite model are looked up by them, whatever was said for the whole."""
    config.__dict__.pop("auto_map", None)
    for value in list(config.__dict__.values()):
        if hasattr(value, "sub_configs"):
            without_code(value)


def all_of(values: Any) -> Iterator[tuple[str, Any]]:
    """All keys at any depth, with their values."""
    open_ = [values]
    while open_:
        found = open_.pop()
        if isinstance(found, dict):
            yield from found.items()
            open_ += found.values()
        elif isinstance(found, list):
            open_ += found
