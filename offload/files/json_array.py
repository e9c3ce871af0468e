"""Reads rows from a JSON array, one after the other."""

import json
from codecs import getincrementaldecoder
from collections.abc import Iterator
from functools import partial

from ...io.errors import InputError
from .json_rows import RowRecord, parse_row

_SPACE = " \t\r\n"
_MOST_CHARACTERS = 1 << 30
"""The longest text that is held at once; a longer element is refused."""


def array_records(
    chunks: Iterator[bytes], name: str, *, is_begun: bool
) -> Iterator[RowRecord]:
    """The elements of the array in `chunks`.

    With `is_begun`, `chunks` begin behind an element; otherwise before the bracket.
    Raises InputError if the text is not an array.
    """
    text = _Text(chunks, name)
    if not is_begun:
        text.skip("\ufeff" + _SPACE)
        text.expect("[")
    text.skip(_SPACE + ",")
    while text.peek() != "]":
        content = text.element().encode()
        yield RowRecord(content, text.take_bytes(), 1, partial(parse_row, content))
        text.skip(_SPACE)
        if text.peek() != "]":
            text.expect(",")
            text.skip(_SPACE)
    text.expect("]")
    text.expect_end()


class _Text:
    """The text of the array as far as it is read, and a position in it."""

    def __init__(self, chunks: Iterator[bytes], name: str) -> None:
        self._chunks = chunks
        self._name = name
        self._decoder = getincrementaldecoder("utf-8")()
        self._text = ""
        self._place = 0
        self._taken = 0
        """Where in `_text` the last element ended."""

    def peek(self) -> str:
        """The next character. Raises InputError at the end of the text."""
        if self._place == len(self._text) and not self._has_more():
            raise self._error("it is cut off: its array has no end")
        return self._text[self._place]

    def expect(self, character: str) -> None:
        if self.peek() != character:
            found = self._text[self._place : self._place + 20]
            raise self._error(f"{found!r} stands where {character!r} should")
        self._place += 1

    def expect_end(self) -> None:
        """Checks that only white space is left."""
        while self._place < len(self._text) or self._has_more():
            self.skip_known(_SPACE)
            if self._place < len(self._text):
                found = self._text[self._place : self._place + 20]
                raise self._error(f"{found!r} stands behind its end")

    def skip_known(self, characters: str) -> None:
        """Skips those of `characters` that are in `_text` already."""
        rest = self._text[self._place :]
        self._place += len(rest) - len(rest.lstrip(characters))

    def skip(self, characters: str) -> None:
        while self.peek() in characters:
            self._place += 1

    def element(self) -> str:
        """The next JSON value, as text."""
        while True:
            try:
                _, end = _DECODER.raw_decode(self._text, self._place)
                if end < len(self._text):  # a number may go on
                    found = self._text[self._place : end]
                    self._place = end
                    return found
            except RecursionError:
                raise self._error("a row is nested too deeply") from None
            except ValueError as error:
                if len(self._text) > _MOST_CHARACTERS or not self._has_more():
                    raise self._error(str(error)) from None
                continue
            if not self._has_more():
                raise self._error("it is cut off: its array has no end")

    def take_bytes(self) -> int:
        """The number of bytes from the end of the previous element to the end of this
        one."""
        found = len(self._text[self._taken : self._place].encode())
        self._taken = self._place
        return found

    def _has_more(self) -> bool:
        """Reads more text; False at the end.

        Reads as much as is unread already. So a long element is parsed only a few
        times.
        """
        wanted, pieces = len(self._text) - self._place, [self._text[self._taken :]]
        self._place, self._taken = self._place - self._taken, 0
        found = 0
        try:
            while found <= wanted and (chunk := next(self._chunks, b"")):
                pieces.append(self._decoder.decode(chunk))
                found += len(pieces[-1])
            if found <= wanted:
                self._decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise self._error(f"it is not valid UTF-8: {error.reason}") from None
        self._text = "".join(pieces)
        return found > 0

    def _error(self, why: str) -> InputError:
        return InputError(
            f"{self._name} is not an array of JSON objects, as a .json file that "
            f"begins with [ has to be: {why}"
        )


_DECODER = json.JSONDecoder()
