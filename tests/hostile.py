"""Files that somebody has tampered with: what JSON and bytes become, and what must not
become of the process that reads them."""

from __future__ import annotations

import copy
import json
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import strategies as st

from penstock.io.errors import PenstockError

MAX_CPU_SECONDS = 10
MAX_GROWTH_BYTES = 1 << 30

DEEP: Any = json.loads("[" * 500 + "]" * 500)
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    7,
    1.5,
    float("nan"),
    float("inf"),
    10**9,
    2**31,
    2**63,
    10**400,
    "",
    "4",
    "auto",
    "a/b",
    "int8",
    "../../etc/passwd",
    "\x1b[2J\x1b[31mRED",
    "\ud800",
    "\0",
    "x" * 100_000,
    [],
    {},
    [None],
    [1, 2, 3],
    [["a"]],
    {"a": 1},
    {"": None},
    DEEP,
)
"""What may stand anywhere in a JSON file."""


def tampered(seed: Any) -> st.SearchStrategy[bytes]:
    """The JSON value `seed` with something changed, as the bytes of a file."""
    return st.one_of(
        st.builds(
            lambda changes: json.dumps(_changed(seed, changes)).encode(),
            st.lists(
                st.tuples(st.integers(0, 10**6), _ACTIONS), min_size=1, max_size=3
            ),
        ),
        broken(json.dumps(seed).encode()),
    )


def broken(content: bytes) -> st.SearchStrategy[bytes]:
    """`content` with bytes cut off, put in or changed."""
    place = st.integers(0, len(content))
    return st.one_of(
        st.builds(lambda at: content[:at], place),
        st.builds(
            lambda at, more: content[:at] + more + content[at:],
            place,
            st.one_of(st.binary(max_size=8), st.sampled_from(_INSERTS)),
        ),
        st.builds(
            lambda at, more: content[:at] + more + content[at + len(more) :],
            place,
            st.binary(min_size=1, max_size=8),
        ),
    )


_INSERTS = (b"[" * 20_000, b'{"a":' * 5_000, b"9" * 5_000, b"\xff\xfe", b'"' * 999)
_ACTIONS = st.one_of(
    st.sampled_from(VALUES).map(lambda value: ("set", value)),
    st.integers(-(2**40), 2**40).map(lambda value: ("set", value)),
    st.just(("drop", None)),
    st.text(max_size=8).map(lambda name: ("rename", name)),
)

_CHANGES = st.tuples(st.integers(0, 10**6), _ACTIONS)


def _changed(seed: Any, changes: list[tuple[int, tuple[str, Any]]]) -> Any:
    found = [copy.deepcopy(seed)]
    for at, (action, value) in changes:
        places = list(_places(found))
        parent, key = places[at % len(places)]
        if action == "set" or parent is found or isinstance(parent, list):
            parent[key] = fresh(value)
        elif action == "drop":
            del parent[key]
        else:
            parent[value] = parent.pop(key)
    return found[0]


def fresh(value: Any) -> Any:
    """One that no other place of a value shares, or has changed."""
    if isinstance(value, list):
        return [fresh(inside) for inside in value]
    if isinstance(value, dict):
        return {key: fresh(inside) for key, inside in value.items()}
    return value


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    if depth > 20:
        return
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inside in list(items):
        yield value, key
        if isinstance(inside, (dict, list)) and len(inside) < 5_000:
            yield from _places(inside, depth + 1)


class Hung(BaseException):
    """It took too long."""


@contextmanager
def limits() -> Iterator[None]:
    """Raises Hung after ten seconds of this process's time; what would take a gibibyte
    gets MemoryError."""

    def hang(*_: object) -> None:
        raise Hung

    before = signal.signal(signal.SIGVTALRM, hang)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MAX_GROWTH_BYTES, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, before)


def survives(read: Callable[[], object]) -> PenstockError | None:
    """Calls what reads a tampered file: it may work, or say in a sentence why not; that
    error is returned. Anything else comes out as it is, and fails a test."""
    found: PenstockError | None = None
    with limits():
        try:
            read()
        except PenstockError as error:
            found = error
    if found is not None:
        said = str(found)
        assert "memory ran out" not in said, said
        assert 0 < len(said) < 2_000, said
        assert said.replace("\n", "").isprintable(), ascii(said)
        assert found.exit_code in (2, 3), found
    return found
