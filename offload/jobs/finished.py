"""A finished output, and the file beside it that says which job made it, of which
parts.

`OUTPUT.manifest.json` has the manifest, each part's rows and checksums, and the
fingerprint of the output.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import xxhash

from ...io.errors import OutputError
from ...io.regular_file import MAX_INDEX_BYTES, read_whole
from ..files.durable import DurableFiles, sealed, unsealed, write_whole
from ..files.fingerprint import fingerprint
from ..files.outputs import output_format, results_of
from ..files.parts import PartRecord
from ..files.sources import MANIFEST_SUFFIX
from .manifest import Manifest
from .part_store import writing


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished `output`, as the file beside it describes it."""

    output: Path
    manifest: Manifest
    records: Mapping[int, PartRecord]
    fingerprint: str

    @property
    def is_intact(self) -> bool:
        """Whether the output is as it was written."""
        return fingerprint(self.output) == self.fingerprint

    def parts(
        self, replaced: Collection[int]
    ) -> Iterator[tuple[PartRecord, list[bytes]]]:
        """Yields the parts in order, with their results as lines. The parts `replaced`
        may have changed, by a run that ended before it could write this file anew.
        Raises OutputError where another part is not as it was written."""
        lines = results_of(self.output)
        has_lines = output_format(self.output)[0] == "lines"
        for record in self.records.values():
            found = list(islice(lines, record.num_rows))
            digest = xxhash.xxh3_64(b"".join(found)).hexdigest()
            is_same = not has_lines or digest == record.digest
            may_differ = record.number in replaced
            if len(found) < record.num_rows or not (is_same or may_differ):
                raise OutputError(
                    f"{self.output} is not as it was written: begin anew with --restart"
                )
            yield record, found


def manifest_path(output: Path) -> Path:
    """The path of the file beside a finished output."""
    return output.with_name(output.name + MANIFEST_SUFFIX)


def read_finished(output: Path) -> Finished | None:
    """Reads the file beside `output`. None where there is no output, or no valid
    file."""
    try:
        path = manifest_path(output)
        values = unsealed(read_whole(path, MAX_INDEX_BYTES, error=OutputError))
        records = [PartRecord.from_json(part) for part in values["parts"]]
        manifest = Manifest.from_json(values["manifest"])
        mark = str(values["fingerprint"])
    except (OutputError, ValueError, KeyError, TypeError):
        return None
    if not output.is_file():
        return None
    return Finished(output, manifest, {r.number: r for r in records}, mark)


def write_manifest(
    disk: DurableFiles,
    output: Path,
    manifest: Manifest,
    records: Mapping[int, PartRecord],
) -> None:
    """Writes the file beside `output`."""
    values = {
        "manifest": manifest.as_json(),
        "fingerprint": fingerprint(output),
        "num_rows": sum(record.num_rows for record in records.values()),
        "num_errors": sum(record.num_errors for record in records.values()),
        "parts": [record.as_json() for record in records.values()],
    }
    path = manifest_path(output)
    with writing(path):
        write_whole(disk, path, [sealed(values)])
