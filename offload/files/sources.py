"""Which files a job's rows are in: from paths, globs, folders or standard input."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Literal

from ...io.errors import InputError

STDIN = "-"
Layout = Literal["lines", "parquet", "arrow"]
Codec = Literal["", "gz", "zst"]
_LAYOUTS: dict[str, Layout] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "lines",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
_CODECS: dict[str, Codec] = {".gz": "gz", ".zst": "zst"}


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file of rows; `path` is None for standard input."""

    path: Path | None
    layout: Layout = "lines"
    codec: Codec = ""

    @property
    def name(self) -> str:
        return "standard input" if self.path is None else str(self.path)


def find_files(sources: Sequence[str | Path]) -> tuple[InputFile, ...]:
    """The files that `sources` stand for, in their order. A glob (`data/*.jsonl`, `**`
    for all folders below) and a folder (all below it that have a known suffix and no
    part of whose name begins with "." or "_") give theirs sorted by path. Files of
    several formats may be mixed; a file named as itself with an unknown suffix has
    JSON lines. Raises InputError where there is nothing."""
    if [str(source) for source in sources] == [STDIN]:
        return (InputFile(None),)
    files: list[InputFile] = []
    for source in sources:
        if str(source) == STDIN:
            raise InputError("standard input (-) cannot be mixed with files")
        found = list(_found(source))
        if not found:
            raise InputError(
                f"{source} has no file of rows in it: {', '.join(_LAYOUTS)}, or one of "
                f"lines that ends in {' or '.join(_CODECS)}"
            )
        files += found
    return tuple(files)


def check_apart(output: Path, files: Sequence[InputFile]) -> None:
    """Raises InputError where `output` is one of the files that are read."""
    for file in files:
        if file.path is not None and file.path.resolve() == output.resolve():
            raise InputError(
                f"{output} is an input and the output: put results somewhere else"
            )


def format_of(path: Path) -> tuple[Layout, Codec] | None:
    """By its name; None for an unknown suffix. Raises InputError for a compressed file
    of columns, which are compressed in themselves."""
    codec = _CODECS.get(path.suffix.lower(), "")
    layout = _LAYOUTS.get(Path(path.stem if codec else path.name).suffix.lower())
    if codec and layout not in (None, "lines"):
        raise InputError(
            f"{path} is a compressed file of columns, which cannot be read in order: "
            f"write it without {path.suffix}"
        )
    return None if layout is None else (layout, codec)


def _found(source: str | Path) -> Iterator[InputFile]:
    path = Path(source)
    if path.is_dir():
        for inside in sorted(path.rglob("*")):
            parts = inside.relative_to(path).parts
            is_hidden = any(part.startswith((".", "_")) for part in parts)
            if not is_hidden and inside.is_file() and (kind := format_of(inside)):
                yield InputFile(inside, *kind)
    elif has_magic(str(source)) and not path.exists():
        for name in sorted(glob(str(source), recursive=True)):
            if Path(name).is_file():
                yield _named(Path(name))
    elif path.exists():
        if not path.is_file():  # it would be read twice, and has no size
            raise InputError(f"{path} is no file: give a pipe as standard input (-)")
        yield _named(path)
    else:
        raise InputError(f"cannot read {path}: No such file or directory")


def _named(path: Path) -> InputFile:
    codec = _CODECS.get(path.suffix.lower(), "")
    return InputFile(path, *(format_of(path) or ("lines", codec)))
