"""How long a solver may think.  `plan` has no clock: whoever calls a solver brings the limit."""

from collections.abc import Callable
from typing import Protocol


class Budget(Protocol):
    """Asked between two pieces of work; once it is spent it stays spent."""

    def spent(self) -> bool:
        """True when the solver should hand in the best it has."""
        ...


class StepBudget:
    """So many questions, then no more: the same on every machine."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def spent(self) -> bool:
        self._left -= 1
        return self._left < 0


class DeadlineBudget:
    """So many seconds of the clock that is handed in as *now_s*."""

    def __init__(self, now_s: Callable[[], float], limit_s: float) -> None:
        self._now_s = now_s
        self._deadline_s = now_s() + limit_s

    def spent(self) -> bool:
        return self._now_s() >= self._deadline_s
