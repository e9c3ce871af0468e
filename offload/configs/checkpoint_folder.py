"""Finds the folder of the checkpoint that a user names: a folder, or an id of the hub
whose files are in the hub's cache. Nothing is downloaded."""

import os
from pathlib import Path

from ...io.errors import CheckpointError

_REPOSITORY = "models--"
"""How folders of the hub's cache begin."""
_SNAPSHOTS = "snapshots"


def checkpoint_folder(name: str | Path) -> Path:
    """The folder of the checkpoint `name`.

    `name` is a folder (`~` is the home folder), the folder of a repository in the hub's
    cache, or the id of a repository ("org/name") that is in that cache. For a
    repository, it is the snapshot of its main branch. A path that does not exist and
    is no id in the cache is returned as it is, if it looks like a path.

    Raises CheckpointError, which says what to do, if there is no such snapshot.
    """
    text = os.fspath(name)
    path = Path(text)
    if text.startswith("~"):
        try:
            path = path.expanduser()
        except RuntimeError as error:
            raise CheckpointError(
                f"{text}: {error}; give the whole path of the folder"
            ) from error
    if text and os.path.isdir(path):  # which never raises
        is_repository = path.name.startswith(_REPOSITORY)
        has_snapshots = is_repository and (path / _SNAPSHOTS).is_dir()
        return _snapshot(path) if has_snapshots else path
    if (text and os.path.exists(path)) or text.startswith(("/", "./", "../", "~")):
        return path
    return _cached(text)


def _snapshot(repository: Path) -> Path:
    """The snapshot of a repository in the hub's cache: that of main, or the only
    one."""
    try:
        commit = (repository / "refs" / "main").read_text().strip()
    except (OSError, UnicodeDecodeError):
        commit = ""
    folder = repository / _SNAPSHOTS
    if commit and (folder / commit).is_dir() and Path(commit).name == commit:
        return folder / commit
    snapshots = sorted(folder.iterdir()) if folder.is_dir() else []
    if len(snapshots) == 1:
        return snapshots[0]
    raise CheckpointError(
        f"{repository} is a repository of the hub's cache with {len(snapshots)} "
        "snapshots, and none of them is main: give the folder of one, "
        f"{folder}/..., or download the model again"
    )


def _cached(name: str) -> Path:
    """The snapshot of the repository `name` in the hub's cache."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise CheckpointError(
            f"{name[:200] or 'an empty name'} is not a folder, nor an id of the hub "
            "such as org/name: give the folder of a Hugging Face checkpoint"
        ) from None
    cache = Path(constants.HF_HUB_CACHE)
    repository = cache / f"{_REPOSITORY}{name.replace('/', '--')}"
    if not repository.is_dir():
        raise CheckpointError(
            f"{name} is not a folder, and the hub's cache {cache} has no model of this "
            "name: give the folder of a Hugging Face checkpoint, or download the model "
            f"first (hf download {name})"
        )
    return _snapshot(repository)
