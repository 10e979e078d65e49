"""From wanted shares to a plan: the feasible cuts nearest to them, for one order of devices.

Rules of thumb (equal shares, shares by memory) name an order and how many blocks each device should have; what they name may
overfill a device or cross a missing link.  The repair is the same for all of them: among the plans that keep the order, the one
whose numbers of blocks differ least from the wanted ones in sum.  A device may lose all its blocks, which costs its whole share.
None where the order allows no plan.  It looks at no times: a rule is not made better than it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shoal.plan.arrays import INF, Floats, Whole
from shoal.plan.tables import Chain, Pass


@dataclass(frozen=True, slots=True)
class _Grid:
    """For each place in the order: the least deviation by the cut after it, and where it came from."""

    off: Floats
    """[P, N+1]"""
    before: Whole
    """[P, N+1] place before; -1 at the first"""
    start: Whole
    """[P, N+1]"""


def nearest(search: Pass, order: Sequence[int], wanted: Sequence[int]) -> tuple[float, Chain] | None:
    """The deviation and the chain nearest to *wanted* blocks on the devices of *order*, which begins with the pass's first."""
    grid = _filled(search, order, wanted)
    blocks, skipped = search.start.size - 1, np.cumsum([0, *wanted])
    tail: Chain = ()
    rest = skipped[-1] - skipped[1:]
    if search.close is None:
        ends = grid.off[:, blocks] + rest + _zero(search.end[list(order)])
        place, cut = int(ends.argmin()), blocks
        off = float(ends[place])
    else:
        last = np.abs(blocks - np.arange(blocks + 1) - 1) + _zero(search.close)
        both = grid.off + rest[:, None] + last + _zero(search.hop[list(order), search.first, :])
        place, cut = (int(index) for index in np.unravel_index(int(both.argmin()), both.shape))
        off, tail = float(both[place, cut]), ((search.first, cut, blocks),)
    return (off, (*_chain(grid, order, place, cut), *tail)) if np.isfinite(off) else None


def _filled(search: Pass, order: Sequence[int], wanted: Sequence[int]) -> _Grid:
    count, edges = len(order), np.arange(search.start.size)
    skipped = np.cumsum([0, *wanted])
    off = np.full((count, edges.size), INF)
    before, start = np.full(off.shape, -1), np.zeros(off.shape, np.int64)
    off[0] = np.abs(edges - wanted[0]) + _zero(search.start)
    for place in range(1, count):
        device = order[place]
        skip = (skipped[place] - skipped[1 : place + 1])[:, None]
        arrive = off[:place] + skip + _zero(search.hop[list(order[:place]), device, :])
        came = arrive.argmin(axis=0)
        taken = np.abs(edges[None, :] - edges[:, None] - wanted[place]) + _zero(search.run[device])
        total = arrive[came, edges][:, None] + taken
        start[place] = total.argmin(axis=0)
        off[place] = total[start[place], edges]
        before[place] = came[start[place]]
    return _Grid(off, before, start)


def _chain(grid: _Grid, order: Sequence[int], place: int, cut: int) -> Chain:
    chain: list[tuple[int, int, int]] = []
    while place >= 0:
        start = int(grid.start[place, cut])
        chain.append((order[place], start, cut))
        place, cut = int(grid.before[place, cut]), start
    return tuple(reversed(chain))


def _zero(values: Floats) -> Floats:
    """0 where it may be, infinity where it may not."""
    return np.where(np.isfinite(values), 0.0, INF)
