"""Opens checkpoints, with the headers of large ones kept between runs."""

from pathlib import Path

from ...io.checkpoint.index import Checkpoint, open_checkpoint
from ..settings.user_cache import user_cache


def open_model(folder: str | Path, cache: Path | None = None) -> Checkpoint:
    """Describes the checkpoint in `folder`, as `open_checkpoint` does.

    Headers are kept below the folder `cache`, by default the user's cache folder.
    """
    cache = user_cache().path if cache is None else cache
    return open_checkpoint(folder, cache / "headers")
