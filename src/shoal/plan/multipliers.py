"""A price on each device and on each stage, so that a search that forgets what it used is dear where it repeats itself.

The relaxation of `chain.relax` lets a device serve twice.  Pay m for each visit and hand back the sum of all m once: a chain that
visits no device twice gains at most what it paid, so the priced relaxation less the sum is a lower bound for every m >= 0
(Lagrange; Held and Karp).  Limits on the number of stages are one more price.  Memory needs none: each single shard of the
relaxation fits, so a limit of one shard implies it.

The best m is found by subgradient steps (raise what was visited twice, lower what was not visited) of Polyak's length, with some
of the last direction kept against zigzag.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from shoal.plan.arrays import INF, Flags, Floats
from shoal.plan.chain import relax
from shoal.plan.found import Choice
from shoal.plan.memory import Neighbours, learnt, path_of, remember
from shoal.plan.tables import Pass, Tables

PATIENCE = 6
"""Steps without a better bound before they become half as long."""
KEPT = 0.6
"""Of the last direction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How often each device, and how many stages in all, a chain of one pass may have."""

    lower: Floats
    """[M + 1] visits of each device, and at the end stages; -infinity: no lower limit"""
    upper: Floats

    def clip(self, prices: Floats) -> Floats:
        """A price may be negative only where less is forbidden, and positive only where more is."""
        low = np.where(np.isfinite(self.lower), -INF, 0.0)
        high = np.where(np.isfinite(self.upper), INF, 0.0)
        return np.clip(prices, low, high)

    @property
    def counts_down(self) -> bool:
        """Is there something of which a chain may have too little?"""
        return bool(np.isfinite(self.lower).any())

    def most_devices(self, *, closes: bool) -> float:
        """How many devices a chain may have."""
        return float(self.upper[-1]) - int(closes)

    def met(self, used: Flags, *, closes: bool) -> Flags:
        """Which rows [L, M] of used devices keep them."""
        visits = np.column_stack([used, used.sum(axis=1) + int(closes)])
        return np.asarray(((visits >= self.lower) & (visits <= self.upper)).all(axis=1))

    def credit(self, prices: Floats) -> float:
        """The most that a chain within the limits gets back."""
        limits = np.where(prices > 0, self.upper, self.lower)
        return float((prices * np.where(prices, limits, 0.0)).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Priced:
    """A pass with *prices* paid, and what its relaxation says."""

    prices: Floats
    credit: float
    search: Pass
    neighbours: Neighbours
    """What the relaxation remembers."""
    path: list[int] | None
    """The relaxed path's devices, a closing stage left out; None when nothing reaches the end."""
    bound: float
    """A lower bound of the pass without prices: the relaxation less `credit`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One pass, and what its chains must satisfy."""

    tables: Tables
    search: Pass
    limits: Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How far to go."""

    steps: int
    neighbours: int
    """How many each device may learn."""
    best_cost: float

    def goal(self, bound: float) -> float:
        """What a step aims at: the best cost known, or some more than the bound."""
        return self.best_cost if np.isfinite(self.best_cost) else bound + 0.05 * abs(bound)


def limits_of(tables: Tables, search: Pass, choice: Choice) -> Limits:
    """Every device once, those that are required at least once, and as many stages as may be."""
    devices = len(tables.nodes)
    lower, upper = np.full(devices + 1, -INF), np.ones(devices + 1)
    upper[search.first] = INF
    for device in range(devices):
        if choice.require >> device & 1 and device != search.first:
            lower[device] = 1
    most = devices + int(search.close is not None)
    upper[devices] = tables.max_stages if tables.max_stages < most else INF
    if tables.stages_exactly:
        lower[devices] = upper[devices] = tables.stages_exactly
    return Limits(lower=lower, upper=upper)


def charged(search: Pass, prices: Floats) -> Pass:
    """The pass in which each visit and each stage costs its price."""
    visit, stage = prices[:-1], prices[-1]
    return dataclasses.replace(
        search,
        start=search.start + stage,
        run=search.run + (visit + stage)[:, None, None],
        close=None if search.close is None else search.close + stage,
    )


def priced(asked: Asked, prices: Floats, neighbours: Neighbours) -> Priced:
    """The relaxation under these prices."""
    paid, credit = charged(asked.search, prices), asked.limits.credit(prices)
    if any(neighbours):
        table = remember(paid, neighbours)
        bound, path = table.bound, path_of(paid, table)
    else:
        relaxed = relax(asked.tables, paid)
        bound, path = relaxed.bound, [device for device, _, _ in relaxed.path] if relaxed.path else None
        path = path[:-1] if path and paid.close is not None else path
    return Priced(prices=prices, credit=credit, search=paid, neighbours=neighbours, path=path, bound=bound - credit)


def tighten(start: Priced, asked: Asked, effort: Effort) -> Iterator[Priced]:
    """Better and better bounds, by subgradient steps and by learning neighbours, until they no longer help."""
    best = now = start
    direction = np.zeros_like(start.prices)
    length, stale = 1.0, 0
    for _ in range(effort.steps):
        if now.path is None:
            break
        visits = _visits(asked, now.path)
        direction = _excess(asked.limits, visits, now.prices) + KEPT * direction
        known = learnt(now.neighbours, now.path, effort.neighbours)
        if not direction.any() and known == now.neighbours:
            break
        goal = effort.goal(best.bound)
        step = length * max(goal - now.bound, 1e-4 * abs(goal)) / max(float(direction @ direction), 1e-9)
        now = priced(asked, asked.limits.clip(now.prices + step * direction), known)
        yield now
        best, stale = (now, 0) if now.bound > best.bound else (best, stale + 1)
        if stale == PATIENCE:
            now, length, stale = dataclasses.replace(best, neighbours=now.neighbours), length / 2, 0
            direction = np.zeros_like(direction)


def _visits(asked: Asked, path: list[int]) -> Floats:
    devices = len(asked.tables.nodes)
    visits = np.bincount(path, minlength=devices + 1).astype(float)
    visits[devices] = len(path) + int(asked.search.close is not None)
    return visits


def _excess(limits: Limits, visits: Floats, prices: Floats) -> Floats:
    """By how much each limit is broken; what is unused at no price needs no change."""
    above = np.where(np.isfinite(limits.upper), visits - limits.upper, -INF)
    below = np.where(np.isfinite(limits.lower), visits - limits.lower, INF)
    excess = np.where(prices > 0, above, np.where(prices < 0, below, np.maximum(above, 0) + np.minimum(below, 0)))
    return np.asarray(np.where(np.isfinite(excess), excess, 0.0))
