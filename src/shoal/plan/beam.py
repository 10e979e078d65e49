"""The anytime answer where all sets of devices are too many: keep the most promising chains at each cut.

Promise is cost so far plus the relaxation's bound on the rest, so nothing that can still win by more than that bound
says is preferred. A chain that is found is real; that none is found proves nothing.
"""

from dataclasses import dataclass

import numpy as np

from shoal.plan.budget import Budget
from shoal.plan.chain import Relaxed
from shoal.plan.tables import INF, Chain, Floats, Pass, Tables

WIDTHS = (4, 32)
"""The narrow beam is bounded work and ignores the budget, so that there is an answer at all; the wide one asks."""


@dataclass(frozen=True, slots=True)
class _Label:
    promise: float
    cost: float
    mask: int
    chain: Chain


def beam(tables: Tables, search: Pass, relaxed: Relaxed, budget: Budget) -> tuple[float, Chain] | None:
    """The best chain found in one pass and its cost, or None when the beam ran dry."""
    narrow = _run(tables, search, relaxed.to_go, (WIDTHS[0], None))
    wide = None if budget.spent() else _run(tables, search, relaxed.to_go, (WIDTHS[1], budget))
    return min((found for found in (narrow, wide) if found), default=None)


def _run(tables: Tables, search: Pass, to_go: Floats, effort: tuple[int, Budget | None]) -> tuple[float, Chain] | None:
    width, budget = effort
    last = search.start.size - 1
    waiting: list[list[_Label]] = [[] for _ in range(last + 1)]
    best: tuple[float, Chain] | None = None
    for label in _start(search, to_go):
        waiting[label.chain[0][2]].append(label)
    for cut in range(1, last + 1):
        for label in sorted(waiting[cut], key=lambda item: item.promise)[:width]:
            ended = _end(tables, search, label, last)
            best = min((found for found in (best, ended) if found), default=None)
            if cut == last or (budget and budget.spent()):
                continue
            for grown in _grow(tables, search, to_go, label, width):
                if best is None or grown.promise < best[0]:
                    waiting[grown.chain[-1][2]].append(grown)
        waiting[cut] = []
    return best


def _start(search: Pass, to_go: Floats) -> list[_Label]:
    promise = search.start + to_go[:, search.first]
    stops = np.flatnonzero(np.isfinite(promise))
    mask = 1 << search.first
    return [_Label(float(promise[s]), float(search.start[s]), mask, ((search.first, 0, int(s)),)) for s in stops]


def _grow(tables: Tables, search: Pass, to_go: Floats, label: _Label, width: int) -> list[_Label]:
    device, _, cut = label.chain[-1]
    if len(label.chain) + int(search.close is not None) >= (tables.stages_exactly or tables.max_stages):
        return []
    cost = label.cost + search.hop[device, :, cut][:, None] + search.run[:, cut, :]
    cost[[d for d in range(len(tables.nodes)) if label.mask >> d & 1]] = INF
    promise = cost + to_go.T
    flat = promise.ravel()
    picks = np.argpartition(flat, min(width, flat.size - 1))[:width]
    grown = [(float(flat[pick]), *divmod(int(pick), promise.shape[1])) for pick in picks if np.isfinite(flat[pick])]
    return [_Label(p, float(cost[d, s]), label.mask | 1 << d, (*label.chain, (d, cut, s))) for p, d, s in grown]


def _end(tables: Tables, search: Pass, label: _Label, last: int) -> tuple[float, Chain] | None:
    device, _, stop = label.chain[-1]
    chain, cost = label.chain, INF
    if search.close is not None and stop < last:
        cost = label.cost + float(search.hop[device, search.first, stop] + search.close[stop])
        chain = (*chain, (search.first, stop, last))
    elif search.close is None and stop == last:
        cost = label.cost + float(search.end[device])
    counted = len(chain) <= tables.max_stages and tables.stages_exactly in {0, len(chain)}
    return (cost, chain) if counted and np.isfinite(cost) else None
