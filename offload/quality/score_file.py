"""Keeps the token scores of rows in a file without a name, in their order."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Self

import numpy as np
import torch

from ...io.errors import OutputError
from .token_scores import TokenScores

_HEAD = np.dtype([("num_tokens", "<i8"), ("digest", "<i8")])


class ScoreFile:
    """Scores of many rows, 8 bytes a token, in a file in `folder` that has no name and
    is gone when it is closed. Rows are first all put, then read. Raises OutputError if
    there is no room."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            self._file = TemporaryFile(dir=folder)  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def put(self, scores: TokenScores | None) -> None:
        """Adds the scores of the next row; None for a row that has none."""
        if scores is None:
            parts = [_head(0, 0)]
        else:
            arrays = (scores.logprobs.numpy(), scores.tops.numpy())
            parts = [
                _head(len(scores.tops), scores.ids_digest),
                *(array.tobytes() for array in arrays),
            ]
        with self._writing():
            self._file.write(b"".join(parts))

    def rows(self) -> Iterator[TokenScores | None]:
        """The scores of each row, in the order in which they were put."""
        with self._writing():
            self._file.seek(0)
        while head := self._file.read(_HEAD.itemsize):
            num, digest = np.frombuffer(head, _HEAD)[0].tolist()
            logprobs, tops = (
                torch.frombuffer(bytearray(self._file.read(4 * num)), dtype=dtype)
                if num
                else torch.empty(0, dtype=dtype)
                for dtype in (torch.float32, torch.int32)
            )
            yield TokenScores(logprobs, tops, digest) if num else None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"cannot keep scores in {self._folder}: {error.strerror}; set io.cache "
                "to a folder with room for 8 bytes a token"
            ) from error


def _head(num_tokens: int, digest: int) -> bytes:
    return np.array((num_tokens, digest), _HEAD).tobytes()
