"""The only door to time: decisions get seconds as arguments, shells get a `Clock`."""

import time
from typing import Protocol


class Clock(Protocol):
    """Monotonic seconds with an arbitrary zero; never compared between two nodes (ADR 4)."""

    def now_s(self) -> float:
        """Seconds since this clock's zero; never falls."""
        ...


class SystemClock:
    """The machine's monotonic clock."""

    def now_s(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that moves only when told to, for tests and rehearsals."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now_s(self) -> float:
        return self._now_s

    def advance(self, by_s: float) -> None:
        """Move forward by *by_s* seconds; raises ValueError when negative."""
        if by_s < 0:
            raise ValueError(f"a clock cannot go back by {-by_s} s")
        self._now_s += by_s
