"""Finds the files with a job's rows: paths, globs, folders, or standard input."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Literal

from ...io.errors import InputError

STDIN = "-"
PARTS_SUFFIX = ".parts"
MANIFEST_SUFFIX = ".manifest.json"
"""The suffixes of what is kept beside an output: a folder of parts, and a manifest."""
REPORT_FILES = ("report.json", "trace.json")
FileFormat = Literal["lines", "json", "csv", "text", "parquet", "arrow"]
"""`lines` are lines of JSON; `json` is a JSON array, or lines of JSON as well."""
Compression = Literal["", "gz", "zst"]
_FORMATS: dict[str, FileFormat] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".csv": "csv",
    ".txt": "text",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
_COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst"}


KNOWN = (
    f"rows are read from {', '.join(_FORMATS)} files, and all but the columns of "
    f"Parquet and Arrow may be compressed ({', '.join(_COMPRESSIONS)})"
)


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file of rows. `path` is None for standard input."""

    path: Path | None
    file_format: FileFormat = "lines"
    compression: Compression = ""

    @property
    def name(self) -> str:
        return "standard input" if self.path is None else str(self.path)


@dataclass(frozen=True, slots=True)
class Own:
    """The output and the report folder of a job, which must not be among its inputs."""

    output: Path | None = None
    report: Path | None = None
    """The folder of the report; None if there is no report."""

    def has(self, path: Path) -> bool:
        """Whether `path` is written by this job, is kept by any job beside its output,
        or belongs to a report."""
        beside = path.parent
        if path.name.endswith(MANIFEST_SUFFIX):
            output = path.with_name(path.name.removesuffix(MANIFEST_SUFFIX))
            if output.exists() or self._is_output(output):
                return True
        if any(_holds_parts(folder) for folder in path.parents):
            return True
        if path.name in REPORT_FILES:
            is_ours = self.report is not None and _is_same(beside, self.report)
            return is_ours or (beside / "report.html").exists()
        return self._is_output(path)

    def _is_output(self, path: Path) -> bool:
        return self.output is not None and _is_same(path, self.output)


def _is_same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _holds_parts(folder: Path) -> bool:
    return folder.name.endswith(PARTS_SUFFIX) and (folder / "lock").exists()


def find_files(
    sources: Sequence[str | Path],
    own: Own = Own(),
) -> tuple[InputFile, ...]:
    """The files that `sources` name, in their order.

    A glob such as `data/*.jsonl` (`**` stands for all folders below) gives its files
    sorted by path. So does a folder: all files below it that have a known suffix,
    unless a part of the path begins with "." or "_". Files that jobs have written are
    left out; `own` says which this job writes. Files of several formats may be mixed; a
    file without suffix has lines of JSON.

    Raises InputError if a source gives no file, or has an unknown suffix.
    """
    if [str(source) for source in sources] == [STDIN]:
        return (InputFile(None),)
    files: list[InputFile] = []
    for source in sources:
        if str(source) == STDIN:
            raise InputError("standard input (-) cannot be mixed with files")
        try:
            found = list(_found(source, own))
        except (OSError, ValueError) as error:  # such as a name that is too long
            why = getattr(error, "strerror", None) or error
            raise InputError(f"cannot read {source}: {why}") from error
        if not found:
            raise InputError(f"{source} has no file of rows in it: {KNOWN}")
        files += found
    return tuple(files)


def check_apart(output: Path, files: Sequence[InputFile]) -> None:
    """Raises InputError if `output` is one of the input files."""
    for file in files:
        if file.path is not None and file.path.resolve() == output.resolve():
            raise InputError(
                f"{output} is an input and the output: put results somewhere else"
            )


def format_of(path: Path) -> tuple[FileFormat, Compression] | None:
    """The format and compression of the file `path`, by its name; None if the suffix is
    unknown.

    A file without suffix has lines of JSON. Raises InputError for a compressed file of
    columns, since columns are compressed themselves.
    """
    compression = _COMPRESSIONS.get(path.suffix.lower(), "")
    suffix = Path(path.stem if compression else path.name).suffix.lower()
    file_format = _FORMATS.get(suffix) if suffix else "lines"
    if compression and file_format in ("parquet", "arrow"):
        raise InputError(
            f"{path} is a compressed file of columns, which cannot be read in order: "
            f"write it without {path.suffix}"
        )
    return None if file_format is None else (file_format, compression)


def _found(source: str | Path, own: Own) -> Iterator[InputFile]:
    path = Path(source)
    if path.is_dir():
        for inside in sorted(path.rglob("*")):
            parts = inside.relative_to(path).parts
            is_hidden = any(part.startswith((".", "_")) for part in parts)
            if is_hidden or not inside.suffix or own.has(inside):
                continue
            if inside.is_file() and (kind := format_of(inside)):
                yield InputFile(inside, *kind)
    elif has_magic(str(source)) and not path.exists():
        for name in sorted(glob(str(source), recursive=True)):
            if Path(name).is_file() and not own.has(Path(name)):
                yield _named(Path(name))
    elif path.exists():
        if not path.is_file():  # a pipe would be read twice, and has no size
            raise InputError(f"{path} is not a file: give a pipe as standard input (-)")
        yield _named(path)
    else:
        raise InputError(f"cannot read {path}: No such file or directory")


def _named(path: Path) -> InputFile:
    found = format_of(path)
    if found is None:
        raise InputError(f"{path} is of a kind that is not read: {KNOWN}")
    return InputFile(path, *found)
