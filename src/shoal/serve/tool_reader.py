"""From the text of an answer to the calls of tools in it, as it comes.

Text before a call may turn out to be the beginning of its mark, and blanks before a mark belong to neither; both are held back
until that is settled, so that a stream shows neither half a mark nor the line break before one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

import msgspec

from shoal.model.tool_format import Layout, ToolFormat
from shoal.serve.assemble import CallNews, Piece, overlap
from shoal.serve.call_scan import CallScan, ValueEnd


class _Place(Enum):
    START = auto()
    """Nothing but blanks so far: a bare call may still begin."""
    TEXT = auto()
    MARKED = auto()
    """Between the marks, outside of an object."""
    OBJECT = auto()
    ARGUMENTS = auto()
    """In the arguments of a call whose name stands outside of its JSON."""


@dataclass(slots=True, kw_only=True)
class ToolReader:
    """One answer's text; owned by the task that reads it.  `new_id` names a call."""

    form: ToolFormat
    new_id: Callable[[], str]
    calls: int = 0
    """Calls seen so far."""
    _place: _Place = field(init=False)
    _held: str = ""
    _scan: CallScan = field(init=False)
    _value: ValueEnd = field(init=False)
    _named: bool = False
    _news: list[CallNews] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._place = _Place.START if self.form.layout is Layout.BARE else _Place.TEXT

    def read(self, piece: Piece) -> Piece:
        """*piece* with its calls taken out of its text."""
        text, calls = self.push(piece.text, last=piece.finish is not None)
        return msgspec.structs.replace(piece, text=text, calls=calls, called=self.calls > 0)

    def push(self, text: str, *, last: bool = False) -> tuple[str, tuple[CallNews, ...]]:
        """Text that is no call, and news of calls; the *last* push gives what was held back."""
        self._held += text
        shown: list[str] = []
        self._news = []
        while self._held:
            before = (self._place, len(self._held))
            shown.append(self._step())
            if before == (self._place, len(self._held)):
                break
        if last and self._place in (_Place.START, _Place.TEXT) and (self._held.strip() or not self.calls):
            shown.append(self._held)
            self._held = ""
        return "".join(shown), tuple(self._news)

    def _step(self) -> str:
        match self._place:
            case _Place.START:
                return self._begin()
            case _Place.TEXT:
                return self._read_text()
            case _Place.MARKED:
                self._read_marked()
            case _Place.OBJECT:
                self._read_object()
            case _Place.ARGUMENTS:
                self._read_arguments()
        return ""

    def _begin(self) -> str:
        """A bare call begins the answer, with its mark or without."""
        seen = self._held.lstrip()
        mark = self.form.begin if self.form.begin in self.form.special else ""
        if mark and seen.startswith(mark):
            self._place, self._held = _Place.MARKED, seen[len(mark) :]
        elif seen.startswith("{"):
            self._place, self._held = _Place.MARKED, seen
        elif seen and not mark.startswith(seen):
            self._place = _Place.TEXT
        return ""

    def _read_text(self) -> str:
        if self.form.layout is Layout.BARE:
            shown, self._held = self._held, ""
            return shown
        at = self._held.find(self.form.begin)
        if at >= 0:
            shown, self._held = self._held[:at].rstrip(), self._held[at + len(self.form.begin) :]
            self._place = _Place.MARKED
            return shown
        kept = len(self._held) - overlap(self._held, self.form.begin)
        kept = len(self._held[:kept].rstrip())
        shown, self._held = self._held[:kept], self._held[kept:]
        return shown

    def _read_marked(self) -> None:
        if self.form.layout is Layout.NAMED:
            name, found, rest = self._held.partition(self.form.divider)
            if found:
                self._open()
                self._tell(name=name.strip())
                self._place, self._held, self._value = _Place.ARGUMENTS, rest, ValueEnd()
            return
        closing = self.form.end or ("]" if self.form.layout is Layout.LIST else "")
        start, stop = self._held.find("{"), self._held.find(closing) if closing else -1
        if start >= 0 and (stop < 0 or start < stop):
            self._open()
            self._scan = CallScan(self.form.name_key, self.form.arguments_key)
            self._place, self._held = _Place.OBJECT, self._held[start + 1 :]
        elif stop >= 0:
            self._place, self._held = _Place.TEXT, self._held[stop + len(closing) :]
        else:
            self._held = self._held[len(self._held) - overlap(self._held, closing) :]

    def _read_object(self) -> None:
        arguments, self._held = self._scan.push(self._held)
        if self._scan.name:
            self._tell(name=self._scan.name, arguments=arguments)
        if self._scan.ended:
            self._place = _Place.MARKED

    def _read_arguments(self) -> None:
        for at, character in enumerate(self._held):
            self._value.takes(character)
            if self._value.ended:
                self._tell(arguments=self._held[: at + 1].lstrip())
                self._place, self._held = _Place.TEXT, self._held[at + 1 :]
                return
        self._tell(arguments=self._held)
        self._held = ""

    def _open(self) -> None:
        self.calls += 1
        self._named = False

    def _tell(self, *, name: str = "", arguments: str = "") -> None:
        if name and not self._named:
            self._named = True
            self._news.append(CallNews(index=self.calls - 1, id=self.new_id(), name=name, arguments=arguments))
        elif arguments:
            self._news.append(CallNews(index=self.calls - 1, arguments=arguments))


def call_id(number: int, characters: int) -> str:
    """A call's id; *characters* letters and digits where the model's template insists on a length."""
    if not characters:
        return f"call_{number:016x}"
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    return "".join(digits[number // 36**place % 36] for place in range(characters))


def whole_calls(news: tuple[CallNews, ...]) -> list[CallNews]:
    """The calls that *news* tell of, complete and in order."""
    whole: dict[int, CallNews] = {}
    for part in news:
        known = whole.get(part.index)
        joined = part if known is None else msgspec.structs.replace(known, arguments=known.arguments + part.arguments)
        whole[part.index] = joined
    return [whole[index] for index in sorted(whole)]
