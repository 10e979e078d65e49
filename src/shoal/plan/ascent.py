"""Better prices of devices and stages for `shoal.plan.visits`, step by step: what was visited twice becomes dearer.

Subgradient steps of Polyak's length towards the best chain known, with some of the last direction kept against zigzag, as in
`shoal.plan.multipliers`; here a device that must take part may be paid for coming.
"""

from collections.abc import Iterator

import numpy as np

from shoal.plan.arrays import INF, Floats
from shoal.plan.lineup import Lineup
from shoal.plan.multipliers import KEPT, PATIENCE
from shoal.plan.visits import Visits, path_of, relaxed

BEYOND = 1.03
"""Where no chain is known, a step aims at so many times the bound."""


def ascend(start: Visits, cost: float) -> Iterator[Visits]:
    """Relaxations under other prices, until none can be better; *cost* is that of the best chain known."""
    best = now = start
    lower, upper = _limits(start.line)
    direction, length, stale = np.zeros_like(start.prices), 1.0, 0
    while np.isfinite(now.bound):
        path = path_of(now)
        visits = np.bincount(path, minlength=lower.size).astype(float)
        visits[-1] = len(path) + 1
        direction = _excess(visits, (lower, upper), now.prices) + KEPT * direction
        if not direction.any():
            return
        goal = cost if cost < INF else BEYOND * best.bound
        step = length * max(goal - now.bound, 1e-4 * abs(goal)) / max(float(direction @ direction), 1e-9)
        prices = np.clip(now.prices + step * direction, np.where(lower > 0, -INF, 0.0), np.where(upper < INF, INF, 0.0))
        now = relaxed(now.line, now.sites, prices)
        yield now
        best, stale = (now, 0) if now.bound > best.bound else (best, stale + 1)
        if stale == PATIENCE:
            now, length, stale = best, length / 2, 0
            direction = np.zeros_like(direction)


def _limits(line: Lineup) -> tuple[Floats, Floats]:
    """[M + 1] fewest and most visits of each device, and stages."""
    lower, upper = np.zeros(line.devices.size + 1), np.ones(line.devices.size + 1)
    lower[1:-1] = line.wanted[1:]
    upper[0] = INF
    lower[-1] = line.stages[0] if line.stages[0] > 2 else 0
    upper[-1] = line.stages[1] if line.stages[1] < line.devices.size else INF
    return lower, upper


def _excess(visits: Floats, limits: tuple[Floats, Floats], prices: Floats) -> Floats:
    """By how much limits are broken; what is unused at no price needs no change."""
    lower, upper = limits
    above = np.where(upper < INF, visits - upper, 0.0)
    below = np.where(lower > 0, visits - lower, 0.0)
    return np.where(prices > 0, above, np.where(prices < 0, below, np.maximum(above, 0) + np.minimum(below, 0)))
