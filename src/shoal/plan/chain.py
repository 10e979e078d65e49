"""Cheapest chains: exact over all sets of devices, and a relaxation that bounds them.

`sweep` is dynamic programming over (set of used devices, last device, blocks done): a shard is one contiguous range,
so its memory is known when it is opened and the state need not carry it (the fault of a search over layers alone,
which loses the optimum or dead-ends as soon as memory binds).  One array operation extends all cuts and predecessors
at once: 2^(M-1) sets of M devices cost about 0.1 ms each.  Label setting with dominance was rejected for these sizes:
it visits fewer states, each of them in Python.

`relax` forgets that a device serves only once: a layered shortest path, a true lower bound, and the optimum when its
path repeats no device.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from shoal.plan.arrays import INF, Floats
from shoal.plan.budget import Budget
from shoal.plan.tables import Chain, Pass, Tables


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxed:
    """`to_go[i, j]` bounds what remains after device j has stopped at block i."""

    bound: float
    to_go: Floats
    path: Chain | None
    """The relaxed path; None when nothing reaches the end."""
    chain: Chain | None
    """The same, when it satisfies every constraint: it is optimal then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Final:
    """The cheapest chain over exactly the devices of *mask*, in one pass."""

    cost: float
    mask: int
    stages: int
    found_in: Pass
    table: dict[int, Floats]


def relax(tables: Tables, search: Pass) -> Relaxed:
    """Bound a pass from below, stage counts and repeated devices forgotten."""
    stop, devices = search.start.size - 1, len(tables.nodes)
    to_go = np.full((stop + 1, devices), INF)
    to_go[stop] = search.end
    for cut in range(stop - 1, 0, -1):
        to_go[cut] = _leave(search, to_go, cut).min(axis=1)
    totals = search.start + to_go[:, search.first]
    path = _follow(search, to_go, int(np.argmin(totals))) if np.isfinite(totals.min()) else None
    chain = path if path and allowed(tables, search, path) else None
    return Relaxed(bound=float(totals.min()), to_go=to_go, path=path, chain=chain)


def sweep(tables: Tables, search: Pass, budget: Budget) -> Iterator[Final]:
    """The cheapest chain for every set of devices; stops early when the budget is spent."""
    first = 1 << search.first
    table = {first: np.full((len(tables.nodes), search.start.size), INF)}
    table[first][search.first] = search.start
    closing = int(search.close is not None)
    for mask in range(first, 1 << len(tables.nodes)):
        if mask not in table or budget.spent():
            continue
        stages = mask.bit_count() + closing
        cost = _finish(search, table[mask])
        if np.isfinite(cost) and stages <= tables.max_stages and tables.stages_exactly in {0, stages}:
            yield Final(cost=cost, mask=mask, stages=stages, found_in=search, table=table)
        if stages < (tables.stages_exactly or tables.max_stages):
            _extend(search, table, mask)


def trace(final: Final) -> Chain:
    """The chain behind a final, found by walking its table backwards."""
    search, mask, stop = final.found_in, final.mask, final.found_in.start.size - 1
    rows = final.table[mask]
    chain: list[tuple[int, int, int]] = []
    if search.close is None:
        device = int(np.argmin(rows[:, stop] + search.end))
    else:
        device, cut = _argmin(rows + search.hop[:, search.first] + search.close)
        chain, stop = [(search.first, cut, stop)], cut
    while mask != 1 << search.first:
        mask ^= 1 << device
        before, cut = _argmin(final.table[mask] + search.hop[:, device] + search.run[device, :, stop])
        chain.append((device, cut, stop))
        device, stop = before, cut
    return (*[(search.first, 0, stop)], *reversed(chain))


def _extend(search: Pass, table: dict[int, Floats], mask: int) -> None:
    rows = table[mask]
    arrive = (rows[:, None, :] + search.hop).min(axis=0)
    for device in range(rows.shape[0]):
        if mask >> device & 1 or not np.isfinite(arrive[device]).any():
            continue
        reached = (arrive[device][:, None] + search.run[device]).min(axis=0)
        if np.isfinite(reached).any():
            grown = table.setdefault(mask | 1 << device, np.full_like(rows, INF))
            grown[device] = reached


def _finish(search: Pass, rows: Floats) -> float:
    if search.close is None:
        return float((rows[:, -1] + search.end).min())
    return float((rows + search.hop[:, search.first] + search.close).min())


def _leave(search: Pass, to_go: Floats, cut: int) -> Floats:
    """[M from, M to] cost to finish when a shard ends at *cut* and the next device goes on as well as it can."""
    onward = (search.run[:, cut, :] + to_go.T).min(axis=1)
    onward[search.first] = INF if search.close is None else search.close[cut]
    return np.asarray(search.hop[:, :, cut] + onward)


def _follow(search: Pass, to_go: Floats, cut: int) -> Chain:
    chain = [(search.first, 0, cut)]
    while cut < search.start.size - 1:
        device = int(np.argmin(_leave(search, to_go, cut)[chain[-1][0]]))
        closes = device == search.first
        stop = search.start.size - 1 if closes else int(np.argmin(search.run[device, cut, :] + to_go[:, device]))
        chain.append((device, cut, stop))
        cut = stop
    return tuple(chain)


def allowed(tables: Tables, search: Pass, chain: Chain) -> bool:
    """Does the chain repeat no device but a closing one, in a number of stages that may be?"""
    used = [device for device, _, _ in chain]
    repeats = len(used) - len(set(used))
    closes = search.close is not None and len(used) > 1
    return repeats == int(closes) and len(used) <= tables.max_stages and tables.stages_exactly in {0, len(used)}


def _argmin(values: Floats) -> tuple[int, int]:
    row, column = np.unravel_index(int(np.argmin(values)), values.shape)
    return int(row), int(column)
