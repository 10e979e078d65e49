"""Which steps to time on a device, and for how long.

The rows and contexts are few: the fit (`shoal.profile.fit`) needs two contexts per row count to see what a position
of context costs, one step of a single row and of a whole chunk, and something between, where engines change kernels.
Points are timed in rounds, a few steps of each, so that a neighbour's burst of load falls on all of them alike; a point
that has settled is not timed again.  A step of another shape than the last one pays for binding anew, which steps of an answer
do not: who runs them makes one untimed step then, and the more steps follow, the less that costs (`burst`).
"""

from collections.abc import Sequence
from statistics import median, quantiles
from typing import Protocol

import msgspec

from shoal.profile.fleet import BlockTrial

SHORT_CONTEXT = 16
LONG_CONTEXT = 512
CHUNKS = (1, 16, 128)
BATCHES = (1, 2, 4)


class TrialRunner(Protocol):
    """Something that steps a block of one kind, loaded on this device."""

    def step_s(self, *, rows: int, context: int, batch: int) -> float:
        """Seconds of one engine call with *rows* new positions after *context* cached ones, for each of *batch* sequences."""
        ...


class TrialPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One shape of step."""

    rows: int
    context: int
    batch: int = 1


class TrialLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What the session can do: positions per sequence (0: it keeps no state) and sequences per call."""

    context_tokens: int
    max_rows: int = 128
    max_batch: int = 1


class TrialBudget(msgspec.Struct, frozen=True, kw_only=True):
    """When to stop: *steps* timed in all, or each point settled.

    A point settles when half its interquartile range is at most *spread* of its median, after *repeats* steps.
    """

    steps: int = 120
    repeats: int = 5
    spread: float = 0.03
    warm_up: int = 1
    """Steps per point that are made first and not counted: engines allocate and pack in them."""
    burst: int = 1
    """Steps of a point before the next one's turn."""
    timed_s: float | None = None
    """No further round after so many seconds of timed steps: a slow device settles for less."""


def trial_points(limits: TrialLimits) -> tuple[TrialPoint, ...]:
    """Points worth timing, the most telling first, within *limits*."""
    chunks = [rows for rows in CHUNKS if rows <= limits.max_rows]
    if not limits.context_tokens:
        alone = [TrialPoint(rows=rows, context=0) for rows in chunks]
        return (
            *alone,
            *(TrialPoint(rows=1, context=0, batch=batch) for batch in BATCHES[1:] if batch <= limits.max_batch),
        )
    short, long = _contexts(limits.context_tokens)
    points = [TrialPoint(rows=1, context=context) for context in sorted({short, long})]
    points += [TrialPoint(rows=rows, context=0) for rows in chunks[1:] if rows <= limits.context_tokens]
    if len(chunks) > 1 and chunks[-1] + long <= limits.context_tokens:
        points.append(TrialPoint(rows=chunks[-1], context=long))
    points += [
        TrialPoint(rows=1, context=context, batch=batch)
        for batch in BATCHES[1:]
        if batch <= limits.max_batch
        for context in sorted({short, long})
    ]
    return tuple(points)


def measure(
    kind: str, runner: TrialRunner, points: Sequence[TrialPoint], budget: TrialBudget | None = None
) -> tuple[BlockTrial, ...]:
    """Time *points* until they settle or the budget is used; a point that was never reached is left out."""
    budget = budget or TrialBudget()
    for point in points:
        for _ in range(budget.warm_up):
            _step_s(runner, point)
    samples: dict[TrialPoint, list[float]] = {point: [] for point in points}
    left = budget.steps
    while left and (waiting := [point for point in points if not _settled(samples[point], budget)]):
        for point in waiting:
            turn = min(left, budget.burst)
            samples[point] += [_step_s(runner, point) for _ in range(turn)]
            left -= turn
        if budget.timed_s is not None and sum(map(sum, samples.values())) >= budget.timed_s:
            break
    return tuple(_trial(kind, point, times) for point, times in samples.items() if times)


def median_trials(passes: Sequence[Sequence[BlockTrial]]) -> tuple[BlockTrial, ...]:
    """Of each shape of the first pass, the trial with the median time among the passes that have it."""
    found: list[BlockTrial] = []
    for first in passes[0]:
        same = [
            t
            for trials in passes
            for t in trials
            if (t.rows, t.batch, t.context) == (first.rows, first.batch, first.context)
        ]
        found.append(sorted(same, key=lambda trial: trial.time_s)[len(same) // 2])
    return tuple(found)


def _contexts(context_tokens: int) -> tuple[int, int]:
    """A short and a long context, each leaving room for a new position."""
    room = context_tokens - 1
    return min(SHORT_CONTEXT, room), min(LONG_CONTEXT, room)


def _step_s(runner: TrialRunner, point: TrialPoint) -> float:
    return runner.step_s(rows=point.rows, context=point.context, batch=point.batch)


def _settled(times: Sequence[float], budget: TrialBudget) -> bool:
    return len(times) >= max(2, budget.repeats) and half_iqr(times) <= budget.spread * median(times)


def _trial(kind: str, point: TrialPoint, times: Sequence[float]) -> BlockTrial:
    return BlockTrial(
        kind=kind,
        rows=point.rows,
        batch=point.batch,
        context=point.context,
        time_s=median(times),
        spread_s=half_iqr(times),
    )


def half_iqr(values: Sequence[float]) -> float:
    """Half the distance between the 25th and the 75th percentile; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / 2
