"""Requests that wait for a slot at the first stage.

The order is that of arrival, with one handicap: a batch request stands where an interactive one would that came `patience_s` later.
So interactive requests go first, and yet none that comes after that time can overtake: nobody starves, and no second queue
with rules between the two is needed.  Batch requests take at most half of the line, so that work sent overnight does not turn
people away.

The line is as long as is of use.  Whoever is let in should not feel the crowd much, so an interactive request may wait about as
long as an answer takes (`queue_s` at least); the rest is told at once that there is no room, and when to come again, while
it can still go elsewhere.  Batch requests wait for as long as it takes, and those that name a time for as long as that allows.
Nobody who stands in line is sent away for a newcomer.
"""

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from shoal.errors import DeadlineExceededError, OverloadedError, UnavailableError
from shoal.ids import RequestId
from shoal.runtime.frames import Submit
from shoal.runtime.request import Priority

_SHARE = 0.2
"""Weight of the newest answer in the mean: a change of load shows after about five."""
_KNOWN = 3
"""So many answers must have ended before anybody is refused by a forecast."""


@dataclass(frozen=True, slots=True)
class Waiter:
    """Somebody in line since *at_s*."""

    submit: Submit
    at_s: float
    rank_s: float
    """When an interactive request with this place would have come."""

    @property
    def deadline_s(self) -> float:
        """When it is too late, on the first stage's clock."""
        given_s = self.submit.request.deadline_s
        return float("inf") if given_s is None else self.at_s + given_s


@dataclass(slots=True)
class Turnover:
    """How long an answer holds its slot: what the wait of others follows from."""

    mean_s: float = 0.0
    count: int = 0

    def ended(self, held_s: float) -> None:
        """An answer gave its slot back after *held_s*."""
        self.count += 1
        self.mean_s += (held_s - self.mean_s) * max(_SHARE, 1 / self.count)

    def wait_s(self, ahead: int, running: int) -> float | None:
        """When somebody with *ahead* others before it may begin, while *running* answers are made; None if nobody can say."""
        if self.count < _KNOWN:
            return None
        return (ahead + 1) * self.mean_s / max(1, running)


@dataclass(slots=True)
class WaitingLine:
    """At most `limit` requests wait.  Owned by the first stage."""

    limit: int
    patience_s: float = 30.0
    queue_s: float = 0.25
    turnover: Turnover = field(default_factory=Turnover)
    _line: list[Waiter] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[Submit]:
        return (waiter.submit for waiter in self._line)

    def __contains__(self, request: RequestId) -> bool:
        return any(w.submit.request.request == request for w in self._line)

    def join(self, submit: Submit, now_s: float) -> None:
        """Stand in line."""
        handicap_s = self.patience_s if submit.request.priority is Priority.BATCH else 0.0
        insort(self._line, Waiter(submit, now_s, now_s + handicap_s), key=lambda waiter: waiter.rank_s)

    def first(self, *, batch: bool) -> Waiter | None:
        """Whose turn it is; with *batch* False none of that kind may go."""
        return next((w for w in self._line if batch or w.submit.request.priority is not Priority.BATCH), None)

    def take(self, waiter: Waiter) -> None:
        """It waits no longer."""
        self._line.remove(waiter)

    def overflow(self, request: RequestId, running: int) -> tuple[Submit, UnavailableError] | None:
        """*request*, the newest, where the line is too long for it or its time would pass there (*running* answers are made)."""
        place = next((at for at, w in enumerate(self._line) if w.submit.request.request == request), None)
        if place is None:
            return None
        waiter = self._line[place]
        wait_s = self.turnover.wait_s(place, running)
        error = self._full(waiter, running) or self._crowded(waiter, place, wait_s) or _foreseen(waiter, place, wait_s)
        if error is None:
            return None
        del self._line[place]
        return waiter.submit, error

    def overdue(self, now_s: float, running: int) -> list[tuple[Submit, UnavailableError]]:
        """Those whose time has passed; they are gone from the line."""
        late = [w for w in self._line if w.deadline_s <= now_s]
        self._line = [w for w in self._line if w.deadline_s > now_s]
        again_s = self.again_s(running)
        return [(w.submit, _too_late(w, again_s)) for w in late]

    def again_s(self, running: int) -> float:
        """When somebody who is sent away now might be let in: when all that stand in line have begun."""
        return max(1.0, self.turnover.wait_s(len(self._line), running) or 0.0)

    def leave(self, request: RequestId) -> Submit | None:
        """Take *request* out of the line; None when it does not stand there."""
        for waiter in self._line:
            if waiter.submit.request.request == request:
                self._line.remove(waiter)
                return waiter.submit
        return None

    def clear(self) -> list[Submit]:
        """Send everybody home."""
        gone = [waiter.submit for waiter in self._line]
        self._line.clear()
        return gone

    def _full(self, waiter: Waiter, running: int) -> OverloadedError | None:
        alike = [w for w in self._line if w.submit.request.priority is Priority.BATCH]
        crowded = waiter in alike and len(alike) > max(1, self.limit // 2)
        if (len(self._line) <= self.limit and not crowded) or waiter.submit.request.admitted:
            return None
        others = f"{len(alike) - 1} batch requests" if crowded else f"{self.limit} requests"
        again_s = max(1.0, self.turnover.wait_s(len(self._line) - 1, running) or 0.0)
        return OverloadedError(
            f"{running} answers are being made and {others} wait: the queue is full",
            hint=f"try again in {again_s:.0f} s",
            retry_after_s=again_s,
        )

    def _crowded(self, waiter: Waiter, ahead: int, wait_s: float | None) -> OverloadedError | None:
        bound_s = max(self.queue_s, self.turnover.mean_s)
        request = waiter.submit.request
        patient = request.priority is Priority.BATCH or request.deadline_s is not None or request.admitted
        if wait_s is None or wait_s <= bound_s or patient:
            return None
        again_s = max(1.0, wait_s - bound_s)
        return OverloadedError(
            f"{ahead} requests wait before this one: it would begin in about {wait_s:.3g} s, and an answer takes "
            f"{self.turnover.mean_s:.3g} s: there are more requests than can be answered",
            hint=f"try again in {again_s:.0f} s, or send it as batch work (service_tier flex), which waits",
            retry_after_s=again_s,
        )


def _foreseen(waiter: Waiter, ahead: int, wait_s: float | None) -> DeadlineExceededError | None:
    given_s = waiter.submit.request.deadline_s
    if given_s is None or wait_s is None or wait_s < given_s:
        return None
    return DeadlineExceededError(
        f"{ahead} requests wait before this one: it would begin in about {wait_s:.3g} s, and {given_s:g} s were given",
        hint="give it more time, or try again later",
        retry_after_s=max(1.0, wait_s - given_s),
    )


def _too_late(waiter: Waiter, again_s: float) -> DeadlineExceededError:
    return DeadlineExceededError(
        f"the answer could not begin within the {waiter.submit.request.deadline_s:g} s that were given",
        hint="give it more time, or try again later",
        retry_after_s=again_s,
    )
