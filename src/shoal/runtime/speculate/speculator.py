"""Speculation at the first stage: which rows of a frame are guesses, and what became of them.

A decoding sequence knows one id that the model has not seen.  With k guessed ids behind it, one lap of the pipeline gives between
one and k + 1 tokens: each row is sampled by the last stage as always, and counts as long as the ids before it were right.
What was wrong is rolled back by saying so: the next rows begin where the right ones ended.

A row beside others of its sequence is computed by another product than a row alone, and its last bits differ.  An answer is
therefore one that plain decoding might have given, and the same one as long as the number of guesses does not depend on time:
a request that must be reproducible is not guessed for while the number adapts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from shoal.ids import RequestId
from shoal.runtime.ports import SequenceStep
from shoal.runtime.request import SampledToken
from shoal.runtime.sequence import LiveSequence
from shoal.runtime.speculate.ahead import Ahead
from shoal.runtime.speculate.draft import Draft, Drafter
from shoal.runtime.speculate.worth import DRAFTED, Chances, Ledger, ahead_length, best_length, kind_of, prior_of

Drafts = Mapping[RequestId, tuple[int, ...]]


class Speculation(msgspec.Struct, frozen=True, kw_only=True):
    """At most `most` ids are guessed per lap (0: none); with `adaptive` as many of them as pay."""

    most: int = 0
    adaptive: bool = True


MOST_GUESSES = 64
OFF = Speculation()
ADAPTIVE = Speculation(most=8)
"""What is served where nobody says anything."""


def agreed(tokens: Sequence[SampledToken], draft: Sequence[int]) -> int:
    """How many of the drafted ids were right: as far as the sampled tokens are the same."""
    pairs = zip(tokens, draft, strict=False)
    return next((i for i, (token, guess) in enumerate(pairs) if token.token != guess), min(len(tokens), len(draft)))


@dataclass(slots=True)
class _Track:
    """What is known of one request: ids that the drafter has, the kind of the guess under way, and how such guesses went."""

    learned: int = 0
    kind: int = 0
    chances: Chances = field(default_factory=Chances)


@dataclass(slots=True)
class Speculator:
    """Owned by the first stage."""

    settings: Speculation
    drafter: Drafter
    context_tokens: int
    ahead: Ahead
    ledger: Ledger = field(default_factory=Ledger)
    chances: Chances = field(default_factory=Chances)
    tracks: dict[RequestId, _Track] = field(default_factory=dict)

    def extend(
        self, batch: Iterable[SequenceStep], live: Mapping[RequestId, LiveSequence], now_s: float = 0.0
    ) -> tuple[tuple[SequenceStep, ...], Drafts]:
        """The batch with guessed rows behind those that decode, and the guesses."""
        batch = tuple(batch)
        if not self.settings.most:
            return batch, {}
        steps: list[SequenceStep] = []
        drafts: dict[RequestId, tuple[int, ...]] = {}
        for step in batch:
            sequence = live[step.request]
            if self.settings.adaptive and sequence.request.reproducible:
                steps.append(step)
                continue
            track = self._learn(sequence, step.start + step.count)
            draft = self._draft(sequence, step, track, len(batch))
            if not draft and self._may_ask(sequence, step):
                draft = self._run_ahead(sequence, track, len(batch), now_s)
            if not draft:
                steps.append(step)
                continue
            drafts[step.request] = draft
            steps.append(msgspec.structs.replace(step, count=step.count + len(draft), logits=1 + len(draft)))
        return tuple(steps), drafts

    def judged(self, request: RequestId, right: int, guessed: int) -> None:
        """Of *guessed* ids of a request the first *right* were so."""
        track = self.tracks.get(request)
        if not guessed or track is None:
            return
        self.chances.judged(track.kind, right, guessed)
        track.chances.judged(track.kind, right, guessed)

    def close(self, request: RequestId) -> None:
        """Forget a request."""
        if self.ahead.close(request):
            self.chances.fade(DRAFTED)  # another text may be easier for it
        if self.tracks.pop(request, None) is not None:
            self.drafter.close(request)

    def _learn(self, sequence: LiveSequence, known: int) -> _Track:
        """Tell the drafter of the ids of positions below *known*: chunk by chunk, so that no step waits for a long prompt."""
        request = sequence.request.request
        track = self.tracks.get(request)
        if track is None:
            self.drafter.open(sequence.request)
            track = self.tracks[request] = _Track()
        begin, track.learned = track.learned, max(track.learned, known)
        if begin < known:
            self.drafter.learn(request, sequence.ids(begin, known - begin))
        return track

    def _draft(self, sequence: LiveSequence, step: SequenceStep, track: _Track, sequences: int) -> tuple[int, ...]:
        """Never so long that the answer would pass its end."""
        if not _decodes(sequence, step):
            return ()
        most = min(self.settings.most, self._room(sequence))
        draft = self.drafter.propose(step.request, most) if most > 0 else Draft()
        track.kind = kind_of(draft.match, predicted=draft.predicted)
        return draft.ids[: self._length(draft, track, sequences)]

    def _room(self, sequence: LiveSequence) -> int:
        """As many guesses as there is place for behind the next token."""
        left = sequence.request.max_tokens - len(sequence.output)
        return max(0, min(left, self.context_tokens - sequence.known) - 1)

    def _may_ask(self, sequence: LiveSequence, step: SequenceStep) -> bool:
        """Whether a guess comes in time depends on time, and what must be reproducible must not."""
        return self.ahead.context_tokens > 0 and _decodes(sequence, step) and not sequence.request.reproducible

    def _run_ahead(self, sequence: LiveSequence, track: _Track, sequences: int, now_s: float) -> tuple[int, ...]:
        """What the draft model expected behind what is known; it is asked what comes next if that pays."""
        room = self._room(sequence)
        foreseen = self.ahead.foresee(sequence, self.chances, track.chances)[: min(self.settings.most, room)]
        chance = track.chances.chance(DRAFTED, self.chances.chance(DRAFTED, prior_of(DRAFTED)))
        length, wanted = len(foreseen), self.settings.most
        if self.settings.adaptive:
            prices = self.ledger.prices(sequences)
            if prices is None:
                return ()
            length = best_length(chance, prices, len(foreseen), others=sequences - 1)
            wanted = ahead_length(chance, prices, wanted, others=sequences - 1)
        draft, track.kind = foreseen[:length], DRAFTED
        self.ahead.sends(sequence.request.request, len(draft))
        wanted = min(wanted, room - len(draft) - 1)  # room in the lap after this one
        if wanted > 0:
            self.ahead.ask(sequence, draft, 1 + wanted, now_s)
        return draft

    def _length(self, draft: Draft, track: _Track, sequences: int) -> int:
        if not self.settings.adaptive or not draft.ids:
            return len(draft.ids)
        prices = self.ledger.prices(sequences)
        if prices is None:
            return 0
        chance = track.chances.chance(track.kind, self.chances.chance(track.kind, prior_of(track.kind)))
        return best_length(chance, prices, len(draft.ids), others=sequences - 1)


def _decodes(sequence: LiveSequence, step: SequenceStep) -> bool:
    """Whether the step is the row of the newest id, which a token is wanted for."""
    return step.count == 1 and step.logits == 1 and bool(sequence.output)
