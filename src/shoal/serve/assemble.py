"""From tokens to the text that a caller sees: detokenised, cut at stop strings, with the tokens that made it.

The gateway finds stop strings (ADR 7), so it must not show text that may turn out to be the beginning of one.  The rule is that
of an observer who reads character by character: the answer ends where the first stop string is completed, and among those
completed there the longest is cut off.  Judging by where a stop string *begins* was rejected: then the answer would
depend on how many characters arrive at once.

A token's log-probability is shown together with the first character of its text; tokens that only made the stop string are dropped.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from shoal.runtime.request import FinishReason, OutputDelta, SampledToken
from shoal.serve.ports import Detokenizer


class CallNews(msgspec.Struct, frozen=True, kw_only=True):
    """News of one call of a tool: its `id` and `name` in the first, a further part of its arguments in each."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


class ShownToken(msgspec.Struct, frozen=True, kw_only=True):
    """A token and where its text begins in the answer, in characters."""

    token: SampledToken
    offset: int


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """News of one answer; `finish` in the last one."""

    text: str = ""
    tokens: tuple[ShownToken, ...] = ()
    finish: FinishReason | None = None
    calls: tuple[CallNews, ...] = ()
    called: bool = False
    """Some tool was called, by this piece or before it."""


class Cut(msgspec.Struct, frozen=True, kw_only=True):
    """Text that may be shown, text that must wait, and whether a stop string ended the answer."""

    shown: str
    held: str
    stopped: bool


def cut_at_stop(text: str, stops: Sequence[str]) -> Cut:
    """Split *text*, whose beginning holds no completed stop string, by the rule above."""
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    if ends:
        return Cut(shown=text[: min(ends)[1]], held="", stopped=True)
    held = max((overlap(text, stop) for stop in stops), default=0)
    return Cut(shown=text[: len(text) - held], held=text[len(text) - held :], stopped=False)


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of *text* that begins *stop*."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(slots=True, kw_only=True)
class Assembler:
    """One answer in the making; owned by the task that reads its deltas."""

    detokenizer: Detokenizer
    stops: tuple[str, ...] = ()
    tokens: int = 0
    """Tokens read, those of a stop string included: what the answer cost."""
    _held: str = ""
    _shown: int = 0
    _waiting: deque[ShownToken] = field(default_factory=deque)
    _ended: bool = False

    def push(self, delta: OutputDelta) -> Piece:
        """What *delta* adds.  After a piece with `finish` the rest of the deltas is not wanted."""
        text: list[str] = []
        for token in delta.tokens:
            self.tokens += 1
            self._waiting.append(ShownToken(token=token, offset=self._shown + len(self._held)))
            shown = self._show(self.detokenizer.push(token.token))
            text.append(shown)
            if self._ended:
                return Piece(text="".join(text), tokens=self._release(), finish=FinishReason.STOP)
        if delta.finish is None:
            return Piece(text="".join(text), tokens=self._release())
        text.append(self._show(self.detokenizer.flush()))
        if self._ended:
            return Piece(text="".join(text), tokens=self._release(), finish=FinishReason.STOP)
        text.append(self._held)
        return Piece(text="".join(text), tokens=tuple(self._waiting), finish=delta.finish)

    def _show(self, new: str) -> str:
        cut = cut_at_stop(self._held + new, self.stops)
        self._held, self._ended = cut.held, cut.stopped
        self._shown += len(cut.shown)
        return cut.shown

    def _release(self) -> tuple[ShownToken, ...]:
        released = []
        while self._waiting and self._waiting[0].offset < self._shown:
            released.append(self._waiting.popleft())
        return tuple(released)
