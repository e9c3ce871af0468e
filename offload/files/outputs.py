"""Writes and reads the file of a job's results: lines, CSV, or columns."""

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ...io.errors import UsageError
from .csv_results import csv_lines, csv_results
from .durable import NEW
from .extras import extra
from .inputs import Inputs
from .json_rows import is_encodable, line_of
from .parts import Position
from .sources import MANIFEST_SUFFIX, Compression, FileFormat, InputFile, format_of

Lines = Iterable[bytes]
_GROUP_ROWS = 65_536
_GZIP_LEVEL = 6
_ZSTD_LEVEL = 3


def destination(output: Path, model: Path) -> Path:
    """The file that `output` names, with links resolved.

    Raises UsageError if no results can be written there, as far as the name tells.
    Files of the checkpoint in the folder `model` are never overwritten.
    """
    try:
        path = output.resolve()
        is_folder = path.is_dir()
        most = os.pathconf(_folder_there(path), "PC_NAME_MAX")
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"results cannot be written to {output}: {why}") from error
    if is_folder:
        raise UsageError(f"{output} is a folder: name a file in it")
    room = most - len(MANIFEST_SUFFIX) - len(NEW)
    nbytes = len(os.fsencode(path.name))
    if nbytes > room:
        raise UsageError(
            f"the name of the output has {nbytes} bytes, but what is kept beside it "
            f"has longer names, of at most {most}: use at most {room}"
        )
    output_format(path)
    is_job = path.with_name(path.name + MANIFEST_SUFFIX).exists()
    if path.exists() and not is_job and path.parent == model.resolve():
        raise UsageError(f"{output} is a file of the model: name another output")
    return path


def _folder_there(path: Path) -> Path:
    return next(folder for folder in path.parents if folder.exists())


def output_format(path: Path) -> tuple[FileFormat, Compression]:
    """The format and the compression of the file `path`, by its suffix; without one,
    lines.

    Raises UsageError for an unknown suffix, and if a package that is needed is missing.
    """
    found = format_of(path)
    if found is None or found[0] == "text":
        raise UsageError(
            f"results cannot be written as {path.suffix}: name the output .jsonl (also "
            ".jsonl.gz, .jsonl.zst), .csv, .parquet or .arrow"
        )
    file_format, compression = found
    if file_format in ("parquet", "arrow"):
        extra("pyarrow", "pyarrow", f"writing {path}")
    if compression == "zst":
        extra("zstandard", "zstandard", f"writing {path}")
    return ("lines" if file_format == "json" else file_format), compression


def encoded(
    lines: Callable[[], Lines], file_format: FileFormat, compression: Compression
) -> Lines:
    """The bytes of a file with these results.

    Each call of `lines` gives all results again, from the first one. The same results
    make the same bytes.
    """
    if file_format in ("parquet", "arrow"):
        return _columns(lines, file_format)
    if file_format == "csv":
        lines = partial(csv_lines, lines)
    if compression == "gz":
        # It contains no name and no time, unlike the result of gzip.open.
        return _compressed(lines(), zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, 31))
    if compression == "zst":
        zstandard = extra("zstandard", "zstandard", "writing zstd")
        made = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True)
        return _compressed(lines(), made.compressobj())
    return lines()


def results_of(path: Path) -> Iterator[bytes]:
    """The results in a file that `encoded` made, as lines of JSON."""
    file_format, compression = output_format(path)
    if file_format == "lines":
        inputs = Inputs([InputFile(path, file_format, compression)], {})
        for row in inputs.rows(Position()):
            yield row.content
        return
    if file_format == "csv":
        yield from csv_results(path, compression)
        return
    kind = "parquet" if file_format == "parquet" else "ipc"
    dataset = extra("pyarrow.dataset", "pyarrow", f"reading {path}")
    found = dataset.dataset(path, format=kind)
    kinds = json.loads((found.schema.metadata or {}).get(_KINDS, b"{}"))
    for batch in found.to_batches(use_threads=False):
        for row in batch.to_pylist():
            values = {
                key: json.loads(value) if kinds.get(key) == "json" else value
                for key, value in row.items()
                if value is not None or key == "id"
            }
            yield line_of(values)


_KINDS = b"penstock"
"""The key in a schema's metadata that holds the kind of each column."""
_MOST_EXACT = 2**53
"""Floats represent all whole numbers up to this one exactly. Larger ones are of kind
"long"."""


def column_kinds(lines: Lines) -> dict[str, str]:
    """The kind of each column: "int", "float", "string", "[int]", and so on.

    "json" means that values are written as JSON text; it is used if values differ in
    kind.
    """
    found: dict[str, str] = {}
    for line in lines:
        for name, value in json.loads(line).items():
            kind = _kind(value)
            known = found.get(name, "null")
            if known != kind and kind != "null":
                found[name] = kind if known == "null" else _common(known, kind)
            else:
                found.setdefault(name, known)
    written = {"null": "json", "long": "int"}
    return {name: written.get(kind, kind) for name, kind in found.items()}


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        kinds = {_kind(item).replace("long", "int") for item in value}
        kind = kinds.pop() if len(kinds) == 1 else "json"
        return f"[{kind}]" if kind in ("int", "float", "string") else "json"
    if isinstance(value, int) and abs(value) > _MOST_EXACT:
        return "long" if -(2**63) <= value < 2**63 else "json"
    if isinstance(value, str) and not is_encodable(value):
        return "json"  # JSON can escape it
    names = {bool: "bool", int: "int", float: "float", str: "string"}
    return names.get(type(value), "json")


def _common(one: str, other: str) -> str:
    both = {one, other}
    if both == {"int", "long"}:
        return "long"
    return "float" if both == {"int", "float"} else "json"


def _compressed(lines: Lines, compressor: Any) -> Iterator[bytes]:
    for line in lines:
        if found := compressor.compress(line):
            yield found
    yield compressor.flush()


class _Sink:
    """A file object that passes on the bytes that are written to it."""

    closed = False

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._position = 0

    def write(self, data: Any) -> int:
        chunk = bytes(data)
        self._chunks.append(chunk)
        self._position += len(chunk)
        return len(chunk)

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def take(self) -> list[bytes]:
        found, self._chunks = self._chunks, []
        return found


def _columns(lines: Callable[[], Lines], file_format: FileFormat) -> Iterator[bytes]:
    pyarrow = extra("pyarrow", "pyarrow", f"writing {file_format}")
    kinds = column_kinds(lines())
    schema = _schema(pyarrow, kinds)
    sink = _Sink()
    with _writer(sink, schema, file_format) as writer:
        for rows in _groups(lines()):
            columns = [
                pyarrow.array([_value(row, name, kinds) for row in rows], field.type)
                for name, field in zip(kinds, schema, strict=True)
            ]
            batch = pyarrow.record_batch(columns, schema=schema)
            writer.write_batch(batch)
            yield from sink.take()
    yield from sink.take()


def _writer(sink: _Sink, schema: Any, file_format: FileFormat) -> Any:
    if file_format == "parquet":
        parquet = extra("pyarrow.parquet", "pyarrow", "writing parquet")
        return parquet.ParquetWriter(sink, schema)
    return extra("pyarrow.ipc", "pyarrow", "writing arrow").new_file(sink, schema)


def _schema(pyarrow: Any, kinds: Mapping[str, str]) -> Any:
    types = {
        "int": pyarrow.int64(),
        "float": pyarrow.float64(),
        "string": pyarrow.string(),
        "bool": pyarrow.bool_(),
        "json": pyarrow.string(),
    }
    fields = [
        pyarrow.field(
            name,
            pyarrow.list_(types[kind[1:-1]]) if kind[0] == "[" else types[kind],
        )
        for name, kind in kinds.items()
    ]
    return pyarrow.schema(fields, metadata={_KINDS: json.dumps(kinds).encode()})


def _value(row: Mapping[str, Any], name: str, kinds: Mapping[str, str]) -> Any:
    value = row.get(name)
    if kinds[name] == "json" and name in row:
        return line_of(value).decode().rstrip("\n")
    return value


def _groups(lines: Lines) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    for line in lines:
        group.append(json.loads(line))
        if len(group) == _GROUP_ROWS:
            yield group
            group = []
    if group:
        yield group
