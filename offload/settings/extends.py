"""Reads policy files and the files that they extend."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

from ...io.errors import PolicyError
from ...io.regular_file import read_whole
from .marked_yaml import MAX_YAML_BYTES, read_yaml
from .origin import Document, Entry, Mark, PolicyProblems, Problem, merge
from .values import parse_setting

SHIPPED = Path(__file__).parents[2] / "examples" / "policies"
"""The policies that come with Penstock, named after machines."""
_KEY = "extends"
_MAX_CHAIN = 32
Known = dict[Path, Document]
"""The files that were read already, by their resolved paths."""


def read_policy(path: str | Path, settings: Sequence[str] = ()) -> Document:
    """Reads the policy file `path`, or the shipped policy with that name.

    It is merged over the files that it `extends`; then `settings` (`key=value`) are
    applied. Raises PolicyError.
    """
    return apply(_read(_locate(str(path), Path()), (), {}), settings)


def shipped() -> list[str]:
    """The names of the policies that come with Penstock."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def apply(document: Document, settings: Sequence[str]) -> Document:
    """Applies `key=value` settings to `document`.

    Nested keys are dotted (`io.threads=4`). Values are YAML and replace what was there;
    null removes it. Raises PolicyError.
    """
    values, entries = deepcopy(document.values), document.entries
    for setting in settings:
        key, value = parse_setting(setting)
        mark = Mark(f"--set {setting}")
        *parents, name = path = tuple(key.split("."))
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise PolicyError(f"{mark}: {key!r}: {parent} has no keys below it")
        target.pop(name, None)
        if value is not None:
            target[name] = value
        entries = {p: e for p, e in entries.items() if p[: len(path)] != path}
        entries[path] = Entry(mark, mark)
        for length in range(1, len(path)):
            entries.setdefault(path[:length], entries[path])
    return Document(values, entries)


def _read(path: Path, chain: tuple[Path, ...], known: Known) -> Document:
    """Reads the file `path` and what it extends, each file once.

    `known` are the files that were read already. `chain` are those that lead from the
    first file to this one.
    """
    place = path.resolve()
    if place not in known:
        known[place] = _read_new(path, (*chain, place), known)
    return known[place]


def read_text(path: Path) -> str:
    """The text of a file with settings. Raises PolicyError if it is not text or is too
    long."""
    content = read_whole(path, MAX_YAML_BYTES, error=PolicyError)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise PolicyError(f"{path} is not valid YAML: {error}") from None


def _read_new(path: Path, chain: tuple[Path, ...], known: Known) -> Document:
    text = read_text(path)
    own = read_yaml(text, str(path))
    asked = own.values.pop(_KEY, [])
    entry = own.entries.pop((_KEY,), None)
    names = asked if isinstance(asked, list) else [asked]
    found = Document({}, {})
    for name in names:
        assert entry is not None, "what is extended was written"
        if not isinstance(name, str) or not name:
            raise _wrong(entry, f"extends {name!r}: write a file, or one of these: ")
        found = merge(found, _read_base(name, path.parent, chain, entry, known))
    return merge(found, own)


def _read_base(
    name: str, folder: Path, chain: tuple[Path, ...], entry: Entry, known: Known
) -> Document:
    base = _locate(name, folder)
    if not _is_file(base):
        lacks = f"there is no {base!s:.300} to extend: write a file, or one of: "
        raise _wrong(entry, lacks)
    if base.resolve() in chain:
        round_ = " -> ".join(p.name for p in (*chain, base))
        message = f"extends is circular ({round_}); take one of them out"
        raise PolicyProblems([Problem(f"{entry.value}: {message}")])
    if len(chain) >= _MAX_CHAIN:
        message = f"extends goes through more than {_MAX_CHAIN} files"
        raise PolicyProblems([Problem(f"{entry.value}: {message}; take some out")])
    return _read(base, chain, known)


def _wrong(entry: Entry, message: str) -> PolicyError:
    return PolicyError(f"{entry.value}: {message}{', '.join(shipped())}")


def _locate(name: str, folder: Path) -> Path:
    """The path of the file `name` in `folder`, or of the shipped policy `name`.

    Shipped policies are named without a suffix.
    """
    if "\0" in name:
        raise PolicyError(f"{name!r:.300} is not a file name")
    path = folder / name
    there = SHIPPED / f"{name}.yaml"
    is_name = Path(name).suffix not in (".yaml", ".yml") and "/" not in name
    return there if is_name and not _is_file(path) and _is_file(there) else path


def _is_file(path: Path) -> bool:
    """Whether `path` is a file; False if its name is too long."""
    try:
        return path.is_file()
    except OSError:
        return False
