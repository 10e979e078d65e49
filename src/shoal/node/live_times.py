"""What a stage's steps and its way to the next stage take while it serves, for its reports.

Steps of an answer only: one new position for each sequence, which is what a plan's time per token is made of.  The thread that
steps notes, the one that reports takes; what was taken is gone, so that each report tells of new steps.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from shoal.fleet.report import HopTimes, StepTimes
from shoal.runtime.ports import SequenceStep

KEPT = 64
"""Steps at most between two reports; earlier ones are forgotten."""
PINGS = 5
"""The quickest of so many counts: the others met a busy stage, which is no fault of the link's.

That of the first ones over a way is what later ones are compared with.
"""


BUSY_S = 5.0
"""How far a stage looks back for the share of time that it was busy: some laps of a slow pipeline, and not a minute ago."""
BUSY_AT_LEAST_S = 0.5
"""Before so much has passed, a share would say more of the moment than of the load."""


@dataclass(slots=True)
class BusyShare:
    """What share of the last `BUSY_S` seconds was worked, from readings of a counter of seconds."""

    _seen: "deque[tuple[float, float]]" = field(default_factory=deque)

    def seen(self, now_s: float, worked_s: float) -> float | None:
        """The share up to *now_s*, 0 to 1, the counter being at *worked_s*; None before there is enough to look back on."""
        self._seen.append((now_s, worked_s))
        while len(self._seen) > 2 and now_s - self._seen[1][0] >= BUSY_S:  # the oldest but one reaches back far enough
            self._seen.popleft()
        since_s, before_s = self._seen[0]
        if now_s - since_s < BUSY_AT_LEAST_S:
            return None
        return min(1.0, max(0.0, (worked_s - before_s) / (now_s - since_s)))


@dataclass(frozen=True, slots=True)
class _Step:
    time_s: float
    batch: int
    context: float


@dataclass(slots=True)
class LiveTimes:
    """Steps and pings since the last report."""

    _steps: "deque[_Step]" = field(default_factory=lambda: deque(maxlen=KEPT))
    _noted: int = 0
    _pings: "deque[float]" = field(default_factory=lambda: deque(maxlen=PINGS))
    _pinged: int = 0
    _base_s: float = 0.0

    def stepped(self, sequences: Sequence[SequenceStep], time_s: float) -> None:
        """An engine call is over; prompts and inferences are not counted."""
        if sequences and all(step.count == 1 for step in sequences):
            self._noted += 1
            self._steps.append(_Step(time_s, len(sequences), fmean(step.start for step in sequences)))

    def pinged(self, rtt_s: float) -> None:
        """A hello came back over the way."""
        self._pings.append(rtt_s)
        self._pinged += 1
        if self._pinged <= PINGS:
            self._base_s = min(self._pings)

    def wired(self) -> None:
        """There is another way: what is known of the old one says nothing of it."""
        self._pings.clear()
        self._pinged, self._base_s = 0, 0.0

    def take_steps(self) -> StepTimes | None:
        """Steps since this was asked last, of the batch that most of them had; None when there were none."""
        taken: list[_Step] = []
        while self._steps:
            taken.append(self._steps.popleft())
        if not taken:
            return None
        (batch, _), *_ = Counter(step.batch for step in taken).most_common(1)
        alike = [step for step in taken if step.batch == batch]
        return StepTimes(
            until=self._noted,
            time_s=median(step.time_s for step in alike),
            batch=batch,
            context=fmean(step.context for step in alike),
        )

    def hop(self) -> HopTimes | None:
        """The quickest of the newest round trips; None before there are enough to compare with the first ones."""
        if self._pinged <= PINGS:
            return None
        return HopTimes(until=self._pinged, rtt_s=min(self._pings), base_s=self._base_s)
