"""Hundreds of devices without an integer programme: bounds by site, then chains near them, on fewer and fewer devices.

In turn, and each step the better for the one before: prices (`shoal.plan.ascent`) raise the bound of `shoal.plan.visits`; its
paths lead beginnings to a chain (`shoal.plan.walks`); devices whose bound is above that chain are out.  The more are out the more
sites are as small as their devices, and the more beginnings there is time for, until nothing is dropped: then the chain is proven.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from shoal.plan.arrays import INF, Floats, Whole
from shoal.plan.ascent import ascend
from shoal.plan.budget import Budget, StepBudget
from shoal.plan.lineup import Lineup, Parts
from shoal.plan.sites import dealings, sites_of
from shoal.plan.visits import Visits, forced, relaxed
from shoal.plan.walks import ROUNDING, walk

LEVELS = ((20, 16), (30, 64), (40, 256), (40, 1024), (40, 4096), (40, 16384), (40, 65536))
"""Steps of prices, and how many beginnings at each number of units then."""

UNHURRIED = 10**9
"""Questions of the first walk's budget: it is of bounded work, and must be done for there to be a chain at all."""

TRIED = 8
"""Steps before a dealing is judged."""


@dataclass(slots=True)
class Throng:
    """The best chain and the best bound so far, and what is left to search."""

    line: Lineup
    prices: Floats = field(init=False)
    cost: float = INF
    chain: tuple[tuple[int, int], ...] | None = None
    """Devices as the tables number them, and their units"""
    bound: float = 0.0
    any_will_do: bool = False
    """Of the chains that cost less than the first `cost`"""
    near: float = 0.0
    """A gap that is enough"""
    dealt: Whole | None = None
    """The dealing to keep to, while prices still raise its bound"""

    def __post_init__(self) -> None:
        self.prices = np.zeros(self.line.devices.size + 1)

    @property
    def proven(self) -> bool:
        return self.bound >= self.cost * (1 - 2 * ROUNDING)

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        enough = self.bound >= self.cost * (1 - max(self.near, 2 * ROUNDING))
        return enough or (self.any_will_do and self.chain is not None)


def throng(state: Throng, budget: Budget, levels: Sequence[tuple[int, int]] = LEVELS) -> None:
    """Look for the cheapest chain of two stages or more, as far as these levels and the budget go."""
    for level, (steps, width) in enumerate(levels):
        visits = _ascended(state, _best_dealing(state, budget), steps, budget)
        if state.proven:
            break
        _walked(state, visits, width, budget if level else StepBudget(UNHURRIED))
        if state.done or budget.spent():
            break
        _narrow(state, visits)
    state.bound = min(state.bound, state.cost)


def _walked(state: Throng, visits: Visits, width: int, budget: Budget) -> None:
    found = walk(visits, width, state.cost, budget)
    if found.parts:
        state.cost, state.chain = found.cost, _named(state.line, found.parts)
    state.bound = max(state.bound, min(found.least, state.cost))


def _ascended(state: Throng, start: Visits, steps: int, budget: Budget) -> Visits:
    """The best of so many steps."""
    best, left = start, steps
    state.bound = max(state.bound, start.bound)
    for tried in islice(ascend(start, state.cost), steps):
        best, left = tried if tried.bound > best.bound else best, left - 1
        state.bound = max(state.bound, best.bound)
        if state.proven or budget.spent():
            break
    state.dealt = None if left else best.sites.of
    return best


def _named(line: Lineup, parts: Parts) -> tuple[tuple[int, int], ...]:
    return tuple((int(line.devices[place]), took) for place, took in parts)


def _best_dealing(state: Throng, budget: Budget) -> Visits:
    """The dealing to sites that has the highest bound after a few steps from the prices known, or from none."""
    best: Visits | None = None
    kept = state.dealt is not None
    seen: list[Whole] = []
    for of in dealings(state.line) if state.dealt is None else (state.dealt,):
        if any(np.array_equal(of, other) for other in seen) or (best is not None and budget.spent()):
            continue
        seen.append(of)
        sites = sites_of(state.line, of)
        start = relaxed(state.line, sites, state.prices)
        if state.prices.any() and (free := relaxed(state.line, sites, np.zeros_like(state.prices))).bound > start.bound:
            start = free
        visits = start if kept else _ascended(state, start, TRIED, budget)
        best = visits if best is None or visits.bound > best.bound else best
    assert best is not None
    return best


def _narrow(state: Throng, visits: Visits) -> None:
    """Leave out the devices that no better chain has."""
    keep = forced(visits) < state.cost
    keep[0] = True
    places = np.flatnonzero(keep)
    state.line = state.line.only(places)
    state.prices = visits.prices[[*places, -1]]
    state.dealt = None if state.dealt is None else state.dealt[places]
