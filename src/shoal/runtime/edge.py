"""The way from a stage to the next one: which frames are out, and whether anybody is there.

Two questions that a clock alone answers wrongly.  *Is the next stage alive?*  A step may take a minute there, and a thin link
takes its time: so the next stage shows a sign of life every second from a thread beside its engine, and only silence counts,
and only while something is owed.  *Was a frame lost?*  Frames of one edge keep their order, so the sender says from time
to time what it has sent (`SentFrame`): whoever hears that and has nothing left to do answers for everything up to there,
arrived or not.  A window full of lost frames therefore opens again as soon as the link does.
"""

from collections import deque
from dataclasses import dataclass, field

from shoal.runtime.effects import Tensors
from shoal.runtime.frames import BatchFrame

Work = tuple[BatchFrame, Tensors]


@dataclass(slots=True)
class Edge:
    """At most `credits` frames are out.  `unacked` holds (step, time sent) of those that the next stage is not done with."""

    credits: int
    outbox: deque[Work] = field(default_factory=deque)
    unacked: deque[tuple[int, float]] = field(default_factory=deque)
    heard_s: float = float("-inf")
    """When the next stage last showed that it lives."""
    told_s: float | None = None
    """When the first thing was sent that it has shown no life after."""
    reminded_s: float = 0.0

    def flush(self, now_s: float) -> list[Work]:
        """What may be sent now, counted as sent."""
        sent: list[Work] = []
        while self.outbox and len(self.unacked) < self.credits:
            sent.append(self.outbox.popleft())
            self.unacked.append((sent[-1][0].step, now_s))
            self.tell(now_s)
        return sent

    def tell(self, now_s: float) -> None:
        """Something is sent for which a sign of life is due."""
        if self.told_s is None:
            self.told_s = now_s

    def hear(self, at_s: float) -> None:
        """The next stage showed life at *at_s*."""
        self.heard_s = max(self.heard_s, at_s)
        if self.told_s is not None and self.told_s <= self.heard_s:
            self.told_s = None

    def acknowledge(self, step: int) -> None:
        """Forget what the next stage is done with: all up to *step*."""
        while self.unacked and self.unacked[0][0] <= step:
            self.unacked.popleft()

    def renew(self) -> None:
        """Another run: nobody waits for what was on its way."""
        self.outbox.clear()
        self.unacked.clear()

    def silent_s(self, now_s: float) -> float:
        """For how long something has been owed without a sign of life."""
        owed_since_s = self.unacked[0][1] if self.unacked else self.told_s
        return now_s - max(owed_since_s, self.heard_s) if owed_since_s is not None else 0.0

    def reminder(self, now_s: float, every_s: float) -> int | None:
        """The newest step sent, when it is time to say so again: a frame has been out for *every_s*."""
        if not self.unacked or now_s - max(self.unacked[0][1], self.reminded_s) < every_s:
            return None
        self.reminded_s = now_s
        return self.unacked[-1][0]
