"""Reading the JSON of a call while it is being written: its name as soon as it is whole, its arguments as they come.

The text is known to be JSON (the answer follows a grammar), so nothing is checked here; whatever comes instead never ends a value
and so never becomes a call.
"""

import json
from dataclasses import dataclass, field
from enum import Enum, auto

_OPENING, _CLOSING, _BLANK = "{[", "}]", " \t\r\n"


@dataclass(slots=True)
class ValueEnd:
    """Finds the end of one JSON value.  A number or a word ends *before* the character that shows it."""

    ended: bool = False
    _depth: int = 0
    _in_string: bool = False
    _escaped: bool = False
    _began: bool = False

    def takes(self, character: str) -> bool:
        """Whether *character* belongs to the value."""
        if self._in_string:
            self._string(character)
            return True
        if self._depth == 0 and self._began and character in ",}]" + _BLANK:
            self.ended = True
            return False
        self._began = True
        if character == '"':
            self._in_string = True
        elif character in _OPENING:
            self._depth += 1
        elif character in _CLOSING:
            self._depth -= 1
            self.ended = self._depth == 0
        return True

    def _string(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False
            self.ended = self._depth == 0


class _Phase(Enum):
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    NEXT = auto()


@dataclass(slots=True)
class CallScan:
    """One object `{"name": ..., "arguments": ...}`; *push* starts behind its opening brace.  Keys may come in any order."""

    name_key: str
    arguments_key: str
    name: str = ""
    ended: bool = False
    _phase: _Phase = _Phase.KEY
    _text: list[str] = field(default_factory=list)
    _key: str = ""
    _value: ValueEnd = field(default_factory=ValueEnd)
    _early: list[str] = field(default_factory=list)
    """Arguments that came before the name."""

    def push(self, text: str) -> tuple[str, str]:
        """Arguments that are new, once the name is known; and what of *text* lies behind the object."""
        for at, character in enumerate(text):
            self._take(character)
            if self.ended:
                return self._news(), text[at + 1 :]
        return self._news(), ""

    def _news(self) -> str:
        if not self.name:
            return ""
        news, self._early = "".join(self._early), []
        return news

    def _take(self, character: str) -> None:
        match self._phase:
            case _Phase.KEY:
                self._take_key(character)
            case _Phase.COLON:
                if character == ":":
                    self._phase, self._value, self._text = _Phase.VALUE, ValueEnd(), []
            case _Phase.VALUE:
                self._take_value(character)
            case _Phase.NEXT:
                self._after(character)

    def _take_key(self, character: str) -> None:
        if not self._text and character == "}":
            self.ended = True
        elif self._text or character == '"':
            self._text.append(character)
            self._value.takes(character)
            if self._value.ended:
                self._key, self._phase = json.loads("".join(self._text)), _Phase.COLON

    def _take_value(self, character: str) -> None:
        if not self._text and character in _BLANK:
            return
        taken = self._value.takes(character)
        if taken:
            self._text.append(character)
            if self._key == self.arguments_key:
                self._early.append(character)
        if self._value.ended:
            if self._key == self.name_key:
                self.name = str(json.loads("".join(self._text)))
            self._phase = _Phase.NEXT
            if not taken:
                self._after(character)

    def _after(self, character: str) -> None:
        if character == "}":
            self.ended = True
        elif character == ",":
            self._phase, self._value, self._text = _Phase.KEY, ValueEnd(), []
