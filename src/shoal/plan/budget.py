"""How long a solver may think.  `plan` has no clock: whoever calls a solver brings the limit."""

from collections.abc import Callable
from typing import Protocol


class Budget(Protocol):
    """Asked between two pieces of work; once it is spent it stays spent."""

    def spent(self) -> bool:
        """True when the solver should hand in the best it has."""
        ...

    def share(self, part: float) -> "Budget":
        """A budget of this part of what is left now; what it spends is taken from this one."""
        ...


class StepBudget:
    """So many questions, then no more: the same on every machine."""

    def __init__(self, steps: int, whole: Budget | None = None) -> None:
        self._left, self._whole = steps, whole

    def spent(self) -> bool:
        self._left -= 1
        over = self._whole is not None and self._whole.spent()
        return self._left < 0 or over

    def share(self, part: float) -> Budget:
        return StepBudget(int(max(0, self._left) * part), self)


class DeadlineBudget:
    """So many seconds of the clock that is handed in as *now_s*."""

    def __init__(self, now_s: Callable[[], float], limit_s: float) -> None:
        self._now_s = now_s
        self._deadline_s = now_s() + limit_s

    def spent(self) -> bool:
        return self._now_s() >= self._deadline_s

    def share(self, part: float) -> Budget:
        return DeadlineBudget(self._now_s, max(0.0, self._deadline_s - self._now_s()) * part)
