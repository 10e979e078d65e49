"""The anytime answer where all sets of devices are too many: keep the most promising chains at each cut.

Promise is cost so far plus the relaxation's bound on the rest, so nothing that can still win by more than that bound
says is preferred. Where memory is tight the cheapest beginnings strand the rest of the model, so half of the places
at each cut go to the chains that leave the most memory for what remains. A chain that is found is real; that none is
found proves nothing.
"""

from dataclasses import dataclass

import numpy as np

from shoal.plan.arrays import INF, Floats
from shoal.plan.budget import Budget
from shoal.plan.chain import Relaxed
from shoal.plan.tables import Chain, Pass, Tables

WIDTHS = (4, 16)
"""The narrow beam is bounded work and ignores the budget, so that there is an answer at all; the wide one asks, and runs only
where the narrow one found none: moves (`shoal.plan.moves`) make more of a narrow answer, in less time."""


@dataclass(frozen=True, slots=True)
class _Label:
    promise: float
    cost: float
    mask: int
    chain: Chain
    spare_bytes: float
    """Memory of the devices that are left."""


def beam(tables: Tables, search: Pass, relaxed: Relaxed, budget: Budget) -> tuple[float, Chain] | None:
    """The best chain found in one pass and its cost, or None when the beam ran dry."""
    narrow = _run(tables, search, relaxed.to_go, (WIDTHS[0], None))
    if narrow or budget.spent():
        return narrow
    return _run(tables, search, relaxed.to_go, (WIDTHS[1], budget))


def _run(tables: Tables, search: Pass, to_go: Floats, effort: tuple[int, Budget | None]) -> tuple[float, Chain] | None:
    width, budget = effort
    last = search.start.size - 1
    waiting: list[list[_Label]] = [[] for _ in range(last + 1)]
    best: tuple[float, Chain] | None = None
    for label in _start(tables, search, to_go):
        waiting[label.chain[0][2]].append(label)
    for cut in range(1, last + 1):
        for label in _kept(waiting[cut], width):
            ended = _end(tables, search, label, last)
            best = min((found for found in (best, ended) if found), default=None)
            if cut == last or (budget and budget.spent()):
                continue
            for grown in _grow(tables, search, to_go, label, width):
                if best is None or grown.promise < best[0]:
                    waiting[grown.chain[-1][2]].append(grown)
        waiting[cut] = []
    return best


def _kept(labels: list[_Label], width: int) -> list[_Label]:
    """At one cut all labels have the same blocks left, so the spare memory alone says who is better off."""
    by_promise = sorted(labels, key=lambda label: label.promise)
    by_memory = sorted(by_promise[width:], key=lambda label: -label.spare_bytes)
    return by_promise[:width] + by_memory[:width]


def _start(tables: Tables, search: Pass, to_go: Floats) -> list[_Label]:
    promise = search.start + to_go[:, search.first]
    mask = 1 << search.first
    spare = float(tables.free_bytes.sum() - tables.free_bytes[search.first])
    return [
        _Label(float(promise[s]), float(search.start[s]), mask, ((search.first, 0, int(s)),), spare)
        for s in np.flatnonzero(np.isfinite(promise))
    ]


def _grow(tables: Tables, search: Pass, to_go: Floats, label: _Label, width: int) -> list[_Label]:
    device, _, cut = label.chain[-1]
    if len(label.chain) + int(search.close is not None) >= (tables.stages_exactly or tables.max_stages):
        return []
    cost = label.cost + search.hop[device, :, cut][:, None] + search.run[:, cut, :]
    cost[[d for d in range(len(tables.nodes)) if label.mask >> d & 1]] = INF
    promise = cost + to_go.T
    flat = promise.ravel()
    picks = np.argpartition(flat, min(width, flat.size - 1))[:width]
    places = [*picks[np.isfinite(flat[picks])], *_furthest(promise)]
    return [_label(tables, label, (*divmod(int(pick), promise.shape[1]), cut), promise, cost) for pick in places]


def _furthest(promise: Floats) -> list[int]:
    """Flat places of each device's longest shard: a device that is opened and not filled wastes memory."""
    reachable = np.isfinite(promise)
    stops = promise.shape[1] - 1 - np.argmax(reachable[:, ::-1], axis=1)
    return [d * promise.shape[1] + int(stops[d]) for d in np.flatnonzero(reachable.any(axis=1))]


def _label(tables: Tables, label: _Label, step: tuple[int, int, int], promise: Floats, cost: Floats) -> _Label:
    device, stop, cut = step
    return _Label(
        float(promise[device, stop]),
        float(cost[device, stop]),
        label.mask | 1 << device,
        (*label.chain, (device, cut, stop)),
        label.spare_bytes - float(tables.free_bytes[device]),
    )


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
