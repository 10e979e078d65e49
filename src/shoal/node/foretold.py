"""How far a plan's predictions are from what requests take: said, not hidden.

Measured where a gateway hears the pipeline.  Only requests that were alone in it are compared: a plan says what one request takes,
and whoever waits for others is slower for another reason.  A prompt of another length than the plan's is compared with what the
plan's own stages say of it, within `LENGTHS`; the time per token needs some tokens.
"""

from collections import deque
from dataclasses import dataclass, field
from statistics import median

from shoal.clock import Clock
from shoal.fleet.views import PredictionView
from shoal.plan.problem import Plan

KEPT = 64
"""Requests that the medians are over."""
LENGTHS = (0.25, 4.0)
"""Of the plan's prompt: beyond, its stages say too little of a prompt."""
FEWEST_TOKENS = 8


def first_token_s(plan: Plan, tokens_in: int) -> float:
    """The plan's time to first token for a prompt of another length: what grows with rows, grows; the rest stays."""
    rows_s = sum(stage.prefill_s for stage in plan.stages)
    rows_s += sum(max(0.0, stage.send_prefill_s - stage.send_decode_s) for stage in plan.stages[:-1])
    rows_s = min(rows_s, plan.estimate.time_to_first_token_s)
    return plan.estimate.time_to_first_token_s + rows_s * (tokens_in / plan.shape.tokens_in - 1)


@dataclass(slots=True)
class Watched:
    """One request on its way."""

    tokens_in: int
    began_s: float
    alone: bool
    first_s: float = 0.0
    last_s: float = 0.0
    tokens: int = 0
    guessed: bool = False
    cached: bool = False

    def take(self, tokens: int, now_s: float, *, guessed: bool = False, cached: bool = False) -> None:
        """So many tokens came out of the pipeline.

        With *guessed* ones a lap is not what a plan speaks of, and a prompt of which a part was *cached* is another prompt.
        """
        self.guessed, self.cached = self.guessed or guessed, self.cached or cached
        if tokens and not self.tokens:
            self.first_s = now_s
        if tokens:
            self.last_s = now_s
        self.tokens += tokens


@dataclass(slots=True)
class Foretold:
    """Errors of one plan: (predicted - measured) / measured, of the newest requests.  Belongs to the event loop."""

    plan: Plan
    clock: Clock
    _first: "deque[float]" = field(default_factory=lambda: deque(maxlen=KEPT))
    _each: "deque[float]" = field(default_factory=lambda: deque(maxlen=KEPT))
    _now: list[Watched] = field(default_factory=list)

    def begin(self, tokens_in: int) -> Watched:
        """A request goes off; whoever is there is alone no more."""
        for other in self._now:
            other.alone = False
        watched = Watched(tokens_in, self.clock.now_s(), alone=not self._now)
        self._now.append(watched)
        return watched

    def end(self, watched: Watched) -> None:
        """It is over, well or not; harmless when repeated."""
        if watched not in self._now:
            return
        self._now.remove(watched)
        if not watched.alone or not watched.tokens:
            return
        low, high = (part * self.plan.shape.tokens_in for part in LENGTHS)
        if low <= watched.tokens_in <= high and not watched.cached:
            self._first.append(_error(first_token_s(self.plan, watched.tokens_in), watched.first_s - watched.began_s))
        if watched.tokens >= FEWEST_TOKENS and not watched.guessed:
            each_s = (watched.last_s - watched.first_s) / (watched.tokens - 1)
            self._each.append(_error(self.plan.estimate.time_per_output_token_s, each_s))

    def view(self) -> PredictionView | None:
        """The medians so far; None before there is anything to compare."""
        if not self._first and not self._each:
            return None
        return PredictionView(
            requests=max(len(self._first), len(self._each)),
            time_to_first_token_error=_median(self._first),
            time_per_output_token_error=_median(self._each),
        )


def _error(predicted_s: float, measured_s: float) -> float:
    return abs(predicted_s - measured_s) / measured_s if measured_s > 0 else 0.0


def _median(errors: "deque[float]") -> float | None:
    return median(errors) if errors else None
