"""Chains for crowds: the most promising beginnings at each number of units, with all devices they used.

Promise is what a beginning costs and what `shoal.plan.visits` says of the rest, prices handed back for devices that are not used
yet: a true bound of every chain that begins so.  Of beginnings with the same devices and the same last one the cheapest is kept.
Beginnings that promise no less than the best chain are dropped without loss; those that are dropped for want of room have their
least promise told, so that `least` is a bound whatever was dropped, and a proof when nothing was.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from shoal.plan.arrays import INF, Flags, Floats, Whole
from shoal.plan.budget import Budget
from shoal.plan.lineup import Parts
from shoal.plan.visits import Visits

ROUNDING = 1e-10
"""Relative; what promises less than this much gain is not gone after."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Labels:
    """[L] beginnings."""

    cost: Floats
    last: Whole
    used: Flags
    """[L, M]"""
    due: Floats
    """Prices of what is not used"""
    before: Whole
    """Rows of the log"""


@dataclass(slots=True)
class Walk:
    """The best chain so far and the least promise among what was dropped."""

    visits: Visits
    cost: float
    parts: Parts | None = None
    dropped: float = INF
    log: list[tuple[int, int, int]] = field(default_factory=list)
    """(row before, device, units)"""

    @property
    def least(self) -> float:
        return min(self.cost, self.dropped)

    @property
    def enough(self) -> float:
        return self.cost * (1 - ROUNDING)


def walk(visits: Visits, width: int, cost: float, budget: Budget) -> Walk:
    """Go through all units with *width* beginnings at each; *cost* is that of a chain that is known."""
    line, found = visits.line, Walk(visits=visits, cost=cost)
    waiting: list[list[_Labels]] = [[] for _ in range(line.units + 1)]
    for took in np.flatnonzero(np.isfinite(line.start)).tolist():
        waiting[took].append(_begun(found, took))
    for done in range(line.units + 1):
        labels = _kept(found, waiting[done], done, width)
        waiting[done] = []
        if labels is None:
            continue
        if budget.spent():
            found.dropped = min(found.dropped, float(_promises(found, labels, done).min()))
            continue
        arrive = labels.cost[:, None] + line.hop[labels.last] + line.opening
        arrive[labels.used] = INF
        _finish(found, labels, arrive, done)
        for took, grown in _grown(found, labels, arrive, (done, width)):
            waiting[done + took].append(grown)
    return found


def _begun(found: Walk, took: int) -> _Labels:
    line, prices = found.visits.line, found.visits.prices
    used = np.zeros((1, line.devices.size), bool)
    used[0, 0] = True
    found.log.append((-1, 0, took))
    return _Labels(
        cost=line.start[took : took + 1],
        last=np.zeros(1, np.int64),
        used=used,
        due=np.array([float(prices[1:-1].sum())]),
        before=np.array([len(found.log) - 1]),
    )


def _stages_due(visits: Visits, used: Floats) -> Floats:
    """What the price of a stage hands back to chains of so many stages yet."""
    price = float(visits.prices[-1])
    return price * (visits.line.stages[1 if price > 0 else 0] - used)


def _promises(found: Walk, labels: _Labels, done: int) -> Floats:
    visits = found.visits
    rest = _rest(visits, done)[labels.last]
    return np.asarray(labels.cost + rest - labels.due - _stages_due(visits, labels.used.sum(axis=1)))


def _rest(visits: Visits, done: int) -> Floats:
    """[M] the least that remains after a device."""
    sites = visits.sites
    out = sites.sends_out + visits.to_go[done, sites.of]
    return np.asarray(np.minimum(out, sites.sends_in + visits.inside[done, sites.of]))


def _kept(found: Walk, waiting: list[_Labels], done: int, width: int) -> _Labels | None:
    """The most promising of what came together at this number of units."""
    if not waiting:
        return None
    every = _Labels(
        **{
            name: np.concatenate([getattr(labels, name) for labels in waiting])
            for name in ("cost", "last", "used", "due", "before")
        }
    )
    promise = _promises(found, every, done)
    order = np.argsort(promise, kind="stable")
    order = order[promise[order] < found.enough]
    order = order[_first_of_each(every, order)]
    if order.size > width:
        found.dropped = min(found.dropped, float(promise[order[width]]))
        order = order[:width]
    return _rows(every, order) if order.size else None


def _first_of_each(labels: _Labels, order: Whole) -> Whole:
    """Places in *order* of the first with its devices and its last one."""
    if order.size < 2:
        return np.arange(order.size)
    last = labels.last[order].astype(np.int32)[:, None].view(np.uint8)
    said = np.ascontiguousarray(np.concatenate([np.packbits(labels.used[order], axis=1), last], axis=1))
    keys = said.view(np.dtype((np.void, said.shape[1]))).ravel()
    return np.sort(np.unique(keys, return_index=True)[1])


def _rows(labels: _Labels, rows: Whole) -> _Labels:
    return _Labels(
        cost=labels.cost[rows],
        last=labels.last[rows],
        used=labels.used[rows],
        due=labels.due[rows],
        before=labels.before[rows],
    )


def _finish(found: Walk, labels: _Labels, arrive: Floats, done: int) -> None:
    """Take the best end over one more device."""
    line = found.visits.line
    left = line.units - done
    may = (left <= line.room_last) & (left >= line.least_last)
    stages = labels.used.sum(axis=1) + 1
    counted = (stages >= line.stages[0]) & (stages <= line.stages[1])
    if not may.any() or not counted.any():
        return
    total = np.where(may, arrive + (line.unit * left + line.end), INF)
    lacks = (line.wanted > 0) & ~labels.used
    short = lacks.sum(axis=1)
    total[~counted | (short > 1)] = INF
    total[(short == 1)[:, None] & ~lacks] = INF
    row, device = divmod(int(np.argmin(total)), total.shape[1])
    if total[row, device] < found.enough:
        found.cost = float(total[row, device])
        found.parts = (*_route(found, int(labels.before[row])), (device, left))


def _route(found: Walk, row: int) -> Parts:
    parts: list[tuple[int, int]] = []
    while row >= 0:
        row, device, took = found.log[row]
        parts.append((device, took))
    return tuple(reversed(parts))


def _grown(found: Walk, labels: _Labels, arrive: Floats, place: tuple[int, int]) -> Iterator[tuple[int, _Labels]]:
    """By the units that one more device takes: the most promising, *width* of them."""
    (done, width), line, visits = place, found.visits.line, found.visits
    stages = labels.used.sum(axis=1) + 1
    going = stages < line.stages[1]
    if not going.any():
        return
    due = labels.due[:, None] - visits.prices[:-1]
    handed = due + _stages_due(visits, stages)[:, None]
    handed[~going] = -INF
    for took in range(1, min(int(line.room.max()), line.units - done) + 1):
        total = arrive + np.where(line.room >= took, line.unit * took, INF)
        promise = (total + _rest(visits, done + took) - handed).ravel()
        picks = np.flatnonzero(promise < found.enough)
        if picks.size > width:
            order = np.argpartition(promise[picks], width)
            found.dropped = min(found.dropped, float(promise[picks[order[width]]]))
            picks = picks[order[:width]]
        if picks.size:
            rows, devices = np.divmod(picks, total.shape[1])
            yield took, _label(found, labels, (rows, devices, took), (total, due))


def _label(found: Walk, labels: _Labels, step: tuple[Whole, Whole, int], values: tuple[Floats, Floats]) -> _Labels:
    (rows, devices, took), (total, due) = step, values
    used = labels.used[rows]
    used[np.arange(rows.size), devices] = True
    begin = len(found.log)
    found.log.extend(zip(labels.before[rows].tolist(), devices.tolist(), [took] * rows.size, strict=True))
    return _Labels(
        cost=total[rows, devices],
        last=devices,
        used=used,
        due=due[rows, devices],
        before=np.arange(begin, begin + rows.size),
    )
