"""Layer by layer with the best path carried along: EdgeShard's latency search as charitably as it can be read.

EdgeShard (arXiv 2405.14371, section IV) keeps one best path to each pair (layer, device).  What that path has used of each
device is no part of the state, so its "check memory" has three readings; here the path carries its own usage along (reading B),
the only one that never overfills a device.  It still loses the optimum, or ends where nothing fits any more, as soon as memory
binds: a dearer path to the same pair would have left room.  Exact only where no memory binds and no device is wanted twice.

Kept as a baseline, never as a solver: `chain.sweep` has the shard as its step, so that its memory is known when it is opened.
"""

from dataclasses import dataclass

import numpy as np

from shoal.plan.arrays import INF, Flags, Floats, Whole
from shoal.plan.tables import Chain, Pass, Tables, Weights, cost_passes


@dataclass(frozen=True, slots=True)
class _Paths:
    """The best path that ends on each device; M of them."""

    cost: Floats
    """[M]"""
    base: Floats
    """[M] cost without the shard that is still open"""
    start: Whole
    """[M] first block of the open shard"""
    held: Floats
    """[M, M] bytes that closed shards hold on each device"""
    closed: Flags
    """[M, M] devices that hold a closed shard"""
    chains: tuple[Chain, ...]
    """Closed shards."""


def layer_by_layer(tables: Tables, weights: Weights, again: Flags) -> Chain | None:
    """The search's chain, or None where every path dead-ends; devices in *again* may hold several shards (stages apart)."""
    firsts: dict[int, Pass] = {}
    for search in cost_passes(tables, weights=weights):
        firsts.setdefault(search.first, search)
    found = [_ended(tables, search, _walk(tables, search, again), weights) for search in firsts.values()]
    return min((end for end in found if end), default=(INF, None), key=lambda end: end[0])[1]


def _walk(tables: Tables, search: Pass, again: Flags) -> _Paths:
    devices, blocks = len(tables.nodes), search.start.size - 1
    cost = np.full(devices, INF)
    cost[search.first] = search.run[search.first, 0, 1]
    paths = _Paths(
        cost=cost,
        base=np.zeros(devices),
        start=np.zeros(devices, np.int64),
        held=np.zeros((devices, devices)),
        closed=np.zeros((devices, devices), bool),
        chains=((),) * devices,
    )
    for block in range(1, blocks):
        paths = _step(tables, search, paths, (block, again))
    return paths


def _step(tables: Tables, search: Pass, paths: _Paths, step: tuple[int, Flags]) -> _Paths:
    """Put one more block on each device: the path there goes on, or one from elsewhere opens a shard."""
    block, again = step
    every = np.arange(len(tables.nodes))
    open_bytes = tables.need_bytes[:, block, block + 1]
    fits = (paths.held + open_bytes <= tables.free_bytes) & (again | ~paths.closed)
    arrive = paths.cost[:, None] + search.hop[:, :, block]
    onward = np.where(fits, arrive + search.run[:, block, block + 1], INF)
    grown_bytes = paths.held[every, every] + tables.need_bytes[every, paths.start, block + 1]
    stay = paths.base + search.run[every, paths.start, block + 1]
    np.fill_diagonal(onward, np.where((grown_bytes <= tables.free_bytes) & np.isfinite(paths.cost), stay, INF))
    before = onward.argmin(axis=0)
    held, closed = paths.held.copy(), paths.closed.copy()
    held[every, every] += tables.need_bytes[every, paths.start, block]
    closed[every, every] = True
    stayed = before == every
    return _Paths(
        cost=onward[before, every],
        base=np.where(stayed, paths.base, arrive[before, every]),
        start=np.where(stayed, paths.start, block),
        held=np.where(stayed[:, None], paths.held, held[before]),
        closed=np.where(stayed[:, None], paths.closed, closed[before]),
        chains=tuple(
            paths.chains[j] if stays else (*paths.chains[k], (int(k), int(paths.start[k]), block))
            for j, (k, stays) in enumerate(zip(before, stayed, strict=True))
        ),
    )


def _ended(tables: Tables, search: Pass, paths: _Paths, weights: Weights) -> tuple[float, Chain] | None:
    total = paths.cost + search.end
    last = int(total.argmin())
    if not np.isfinite(total[last]) or not np.isfinite(tables.entry_s[search.first]):
        return None
    entry = weights.latency * float(tables.entry_s[search.first])
    return entry + float(total[last]), (*paths.chains[last], (last, int(paths.start[last]), search.start.size - 1))
