"""Requests that wait for a slot at the first stage.

First come, first served; whoever finds the line full is told so at once rather than left to time out.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from shoal.errors import OverloadedError
from shoal.ids import RequestId
from shoal.runtime.frames import Submit


@dataclass(slots=True)
class WaitingLine:
    """At most `limit` requests wait.  Owned by the first stage."""

    limit: int
    _line: deque[Submit] = field(default_factory=deque)

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[Submit]:
        return iter(self._line)

    def __contains__(self, request: RequestId) -> bool:
        return any(s.request.request == request for s in self._line)

    def join(self, submit: Submit) -> None:
        """Stand in line."""
        self._line.append(submit)

    def next(self) -> Submit:
        """Whose turn it is; not of an empty line."""
        return self._line.popleft()

    def overflow(self, live: int) -> tuple[Submit, OverloadedError] | None:
        """Who has to go because the line is too long, while *live* answers are being made."""
        if len(self._line) <= self.limit:
            return None
        busy = OverloadedError(
            f"{live} answers are being made and {self.limit} requests wait: the queue is full",
            hint="try again in a moment",
        )
        return self._line.pop(), busy

    def leave(self, request: RequestId) -> Submit | None:
        """Take *request* out of the line; None when it does not stand there."""
        for submit in self._line:
            if submit.request.request == request:
                self._line.remove(submit)
                return submit
        return None

    def clear(self) -> list[Submit]:
        """Send everybody home."""
        gone = list(self._line)
        self._line.clear()
        return gone
