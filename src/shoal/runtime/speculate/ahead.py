"""Guesses of a draft model: it runs ahead of the pipeline, and nobody waits for it.

What a lap will bring is not known while it is under way.  The draft model goes on all the same: behind the known ids, and
behind what is guessed in this lap, it foretells the token that the lap will bring, and then what may follow.  If the lap brings
that token, the rest is the guess of the next one; if it brings another, or comes before the draft model is done, the next
lap goes without.  So no row ever waits for a guess, at the price of a lap without guesses after each wrong one.

The draft model has a slot for each of ours, and holds there what it was told and what it made of it; wrong ids are rolled back
by beginning below them.  A text that it has not seen yet is told `CHUNK` ids per lap.  Of each sequence one request is under
way at a time, and of all no more than there are slots: a draft model that never answers costs nothing but its guesses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from shoal.ids import RequestId
from shoal.runtime.effects import AskDraft, DraftDone
from shoal.runtime.sequence import LiveSequence
from shoal.runtime.speculate.worth import DRAFTED, Chances

CHUNK = 128
SILENT_S = 10.0
"""A draft model that has owed an answer for so long is taken to stand still: it slows no lap."""


@dataclass(slots=True)
class _Outlook:
    """What the draft model holds of one sequence, and what it expects.

    It holds the right ids of positions [0, `settled`), of which its cache has those below `fed`; behind them it has, or
    expects, `beyond`, whose first `sent` have gone out as guesses.
    """

    settled: int = 0
    fed: int = 0
    beyond: tuple[int, ...] = ()
    sent: int = 0
    asked: int | None = None
    broken: bool = False


@dataclass(frozen=True, slots=True)
class _Asked:
    request: RequestId
    ask: AskDraft
    known: int
    draft: tuple[int, ...]
    since_s: float


@dataclass(slots=True)
class Ahead:
    """Owned by the speculator.  The draft model has *context_tokens* positions in each of *slots* (0: there is none)."""

    context_tokens: int
    slots: int
    vocabulary: int
    outlooks: dict[RequestId, _Outlook] = field(default_factory=dict)
    out: dict[int, _Asked] = field(default_factory=dict)
    """What has not been answered, by number; also for sequences that have ended."""
    told: list[AskDraft] = field(default_factory=list)
    """What the shell does not know of yet."""
    _number: int = 0

    def foresee(self, sequence: LiveSequence, *chances: Chances) -> tuple[int, ...]:
        """Ids that are expected behind the known ones; *chances* learn how far those before were right."""
        outlook = self.outlooks.get(sequence.request.request)
        if outlook is None or not outlook.beyond:
            return ()
        news = sequence.ids(outlook.settled, sequence.known - outlook.settled)
        right, compared = agreeing(news, outlook.beyond), min(len(news), len(outlook.beyond))
        if outlook.sent <= right and outlook.sent < compared:  # what went out was judged when it came back
            for learned in chances:
                learned.judged(DRAFTED, right - outlook.sent, compared - outlook.sent)
        outlook.settled += right
        outlook.beyond = outlook.beyond[right:] if right == len(news) else ()
        outlook.sent = 0
        return outlook.beyond

    def sends(self, request: RequestId, count: int) -> None:
        """The first *count* of what was foreseen go out as guesses."""
        if count:
            self.outlooks[request].sent = count

    def ask(self, sequence: LiveSequence, draft: tuple[int, ...], count: int, now_s: float) -> None:
        """Have *count* ids foretold behind what is known and *draft*, which goes out now."""
        request = sequence.request.request
        outlook = self.outlooks.setdefault(request, _Outlook())
        if outlook.asked is not None or outlook.broken or len(self.out) >= self.slots:
            return
        known = sequence.known
        end = known + len(draft)
        start = min(outlook.settled + agreeing(draft, outlook.beyond), outlook.fed, end - 1)
        if known - start > CHUNK:
            ids, count = sequence.ids(start, CHUNK), 0
        else:
            ids = (*sequence.ids(start, max(0, known - start)), *draft[max(0, start - known) :])
            count = min(count, self.context_tokens - end)
        if start + len(ids) > self.context_tokens or (start + len(ids) == end and count < 2):
            return  # the first one only foretells what the lap brings
        self._number += 1
        ask = AskDraft(number=self._number, request=request, slot=sequence.slot, start=start, ids=ids, count=count)
        outlook.asked = ask.number
        self.out[ask.number] = _Asked(request, ask, known, draft, now_s)
        self.told.append(ask)

    def answered(self, done: DraftDone) -> None:
        """Take what came; of a sequence that has ended, it is nothing any more."""
        asked = self.out.pop(done.number, None)
        outlook = self.outlooks.get(asked.request) if asked else None
        if asked is None or outlook is None or outlook.asked != done.number:
            return
        outlook.asked = None
        ask, ids = asked.ask, done.ids
        if done.failed or len(ids) != ask.count or any(not 0 <= token < self.vocabulary for token in ids):
            outlook.broken, outlook.beyond = True, ()
            return
        end = ask.start + len(ask.ids)
        if ask.count:
            outlook.settled, outlook.beyond, outlook.sent = asked.known, asked.draft + ids, len(asked.draft)
            outlook.fed = end + len(ids) - 1  # nobody has told it its own last word
        else:
            outlook.settled, outlook.fed, outlook.beyond, outlook.sent = end, end, (), 0

    def busy(self, now_s: float) -> bool:
        """Whether the draft model computes, and so may slow what else does."""
        return any(now_s - asked.since_s < SILENT_S for asked in self.out.values())

    def close(self, request: RequestId) -> bool:
        """Forget a request, whose slot will be told another text from the first position on; whether it was known."""
        return self.outlooks.pop(request, None) is not None

    def take(self) -> list[AskDraft]:
        """What the shell is to be told now."""
        told, self.told = self.told, []
        return told


def agreeing(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many are the same from the first on."""
    pairs = zip(ids, others, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(ids), len(others)))
