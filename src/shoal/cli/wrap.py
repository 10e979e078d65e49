"""A streamed answer on a terminal, broken between words: the terminal itself would break inside them.

A word is held until it ends, for what was printed cannot be taken back.  Scripts without spaces break after any wide character.
"""

import re
from collections.abc import Callable

from rich.cells import cell_len

_PARTS = re.compile(r"\n|[^\S\n]+|[\u1100-\uffef]|[^\s\u1100-\uffef]+")


class Wrapped:
    """Passes text on to *write* with line breaks so that no line is wider than *width* cells; None: as it comes."""

    def __init__(self, write: Callable[[str], object], width: int | None) -> None:
        self._write = write
        self._width = width
        self._column = 0
        self._space = ""
        self._word = ""

    def push(self, text: str) -> None:
        """More of the answer."""
        if self._width is None:
            self._write(text)
            return
        for part in _PARTS.findall(text):
            if part.isspace():
                self._end_word()
                self._white(part)
            else:
                if self._word and (_wide(part) or _wide(self._word)):
                    self._end_word()
                self._word += part

    def flush(self) -> None:
        """The answer is over: show what is held."""
        self._end_word()

    def _white(self, part: str) -> None:
        if part == "\n":
            self._write("\n")
            self._column, self._space = 0, ""
        else:
            self._space += part

    def _end_word(self) -> None:
        if not self._word:
            return
        needed = cell_len(self._space) + cell_len(self._word)
        if self._width is not None and self._column and self._column + needed > self._width:
            self._write("\n" + self._word)
            self._column = cell_len(self._word)
        else:
            self._write(self._space + self._word)
            self._column += needed
        self._space = self._word = ""


def _wide(part: str) -> bool:
    return part[:1] >= "\u1100"
