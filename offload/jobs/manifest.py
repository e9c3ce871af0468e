"""What a job is: its input, its model, what it asks for. Says whether a job that was
begun may be gone on with. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

FORMAT = 2


@dataclass(frozen=True, slots=True)
class Manifest:
    """The identity of a job. What differs in `input`, `model` or `meaning` makes it
    another job; what differs in `rounding` or `versions` may change last bits."""

    input: Mapping[str, Any]
    """By file: bytes and fingerprint."""
    model: Mapping[str, str]
    """By file: its digest."""
    meaning: Mapping[str, Any]
    """The task, its options, and the policy's keys that change what comes out."""
    rounding: Mapping[str, Any]
    """What says which rows share a product, and how it is added up."""
    versions: Mapping[str, str]
    cut: Mapping[str, int]
    """How rows are cut into parts. That of the beginning holds."""
    stamps: Sequence[int]
    """When each file of the input was changed last: nanoseconds, 0 for a stream."""
    chosen: Mapping[str, Any] | None = None
    """Of the policy's keys that the user left open, what was chosen as the job began:
    it is gone on with. None: by a version that chose nothing."""
    retries: bool = False
    """Whether this does failed rows of a finished output again."""

    def as_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Manifest":
        """Raises KeyError or TypeError for what is no manifest of this format."""
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
    """Why what was `begun` is another job than that of `now`, in words."""
    return [
        *_differences("its input", begun.input, now.input),
        *_differences("its model", begun.model, now.model),
        *_differences("", begun.meaning, now.meaning),
    ]


def remarks(begun: Manifest, now: Manifest) -> Sequence[str]:
    """What differs and may change last bits, in words."""
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
