"""The manifest of a job: its input, its model and its options. Says whether a job that
was begun may go on. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

FORMAT = 2


@dataclass(frozen=True, slots=True)
class Manifest:
    """The identity of a job. A difference in `input`, `model` or `meaning` makes it
    another job; a difference in `rounding` or `versions` may change the last bits of
    results."""

    input: Mapping[str, Any]
    """The size and fingerprint of each file."""
    model: Mapping[str, str]
    """The digest of each file."""
    meaning: Mapping[str, Any]
    """The task, its options, and the policy's keys that change results."""
    rounding: Mapping[str, Any]
    """What decides which rows share a matrix product and how sums are rounded."""
    versions: Mapping[str, str]
    cut: Mapping[str, int]
    """How rows are cut into parts. A job that goes on keeps the values that it began
    with."""
    stamps: Sequence[int]
    """When each file of the input was last changed, in nanoseconds; 0 for a stream."""
    chosen: Mapping[str, Any] | None = None
    """The values that were chosen, when the job began, for keys that the user left
    open. A job that goes on keeps them. None: begun by a version that chose nothing."""
    retries: bool = False
    """Whether the job computes failed rows of a finished output again."""

    def as_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Manifest":
        """The manifest in `values`. Raises KeyError or TypeError where they are
        none."""
        if values["format"] != FORMAT:
            raise TypeError(f"format {values['format']!r:.40}, not {FORMAT}")
        values = {"chosen": None, **values}
        found = {name: values[name] for name in cls.__slots__}
        kinds = {"stamps": list, "retries": bool, "chosen": dict | None}
        for name, value in found.items():
            if not isinstance(value, kinds.get(name, dict)):
                raise TypeError(f"{name} is {value!r:.40}")
        return cls(**found)


def refusals(begun: Manifest, now: Manifest) -> Sequence[str]:
    """Why `begun` is another job than `now`, in words; empty where it is the same."""
    return [
        *_differences("its input", begun.input, now.input),
        *_differences("its model", begun.model, now.model),
        *_differences("", begun.meaning, now.meaning),
    ]


def remarks(begun: Manifest, now: Manifest) -> Sequence[str]:
    """The differences that may change last bits, in words."""
    return [
        *_differences("", begun.rounding, now.rounding),
        *_differences("", begun.versions, now.versions),
    ]


def _differences(
    owner: str, begun: Mapping[str, Any], now: Mapping[str, Any]
) -> Iterator[str]:
    """ "its input rows.jsonl is another one", "its seed was 0 and is 1"."""
    for name in sorted(begun.keys() | now.keys()):
        if begun.get(name) == now.get(name) and (name in begun) == (name in now):
            continue
        if owner:
            what = "is new" if name not in begun else "is another one"
            yield f"{owner} {name} {'is gone' if name not in now else what}"
        else:
            yield f"its {name} was {begun.get(name)!r} and is {now.get(name)!r}"
