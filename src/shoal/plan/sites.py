"""What links cost at least, two levels deep: within a site, and between sites.

Devices are dealt to sites; a link then costs at least

    within a site    sends_in[i] + receives_in[j]
    between sites    sends_out[i] + between[site of i, site of j] + receives_out[j]

One site of all devices is a star; a site for each device keeps every link as it is; fleets of switches joined by slow lines lie
between.  Any dealing gives true bounds, so several are tried and the best is kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from shoal.plan.arrays import INF, Floats, Whole
from shoal.plan.lineup import Lineup

STEPS = 3
"""Widest gaps between the costs of links that are tried as the border of sites."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sites:
    """M devices on G sites."""

    of: Whole
    """[M]"""
    members: Whole
    """[G, S] without the first; -1: none"""
    sends_in: Floats
    receives_in: Floats
    """[M]; infinite where a device has no neighbour in its site"""
    sends_out: Floats
    receives_out: Floats
    between: Floats
    """[G, G]"""


def dealings(line: Lineup) -> Iterator[Whole]:
    """[M] the site of each device: each its own; borders at the widest gaps; all in one."""
    count = line.devices.size
    yield np.arange(count)
    costs = np.maximum(line.hop, line.hop.T)[1:, 1:]
    known = np.sort(costs[np.isfinite(costs) & (costs > 0)])
    if known.size > 1:
        steps = np.diff(np.log(known))
        for place in sorted(np.argsort(steps)[-STEPS:]):
            if steps[place] > 0:
                yield _joined(line, float(known[place]))
    yield np.zeros(count, np.int64)


def _joined(line: Lineup, most: float) -> Whole:
    """Devices with links of at most this cost to the founder of a site belong to it."""
    count = line.devices.size
    near = np.minimum(line.hop, line.hop.T) <= most
    of = np.full(count, -1, np.int64)
    site = 0
    for founder in range(count):
        if of[founder] < 0:
            of[founder] = site
            of[near[founder] & (of < 0)] = site
            site += 1
    return of


def sites_of(line: Lineup, of: Whole) -> Sites:
    """The highest prices that were found."""
    of = np.unique(of, return_inverse=True)[1].astype(np.int64)
    same = np.equal.outer(of, of)
    sends_in, receives_in = _split(np.where(same, line.hop, INF), of)
    outside = np.where(same, INF, line.hop)
    between = _least_between(outside, of)
    known = np.isfinite(outside)
    left = np.where(known, outside, INF)
    left[known] -= between[np.ix_(of, of)][known]
    receives_out = _spare(left, 0)
    sends_out = _spare(left - receives_out, 1)
    alone = ~np.isfinite(np.where(same, line.hop, INF)).any(axis=0)
    return Sites(
        of=of,
        members=_members(of),
        sends_in=sends_in,
        receives_in=np.where(alone, INF, receives_in),
        sends_out=sends_out,
        receives_out=receives_out,
        between=between,
    )


def _split(part: Floats, of: Whole) -> tuple[Floats, Floats]:
    """Prices of the ends of links, by the cheapest sender, or as on a star around some device: what leaves less unpaid."""
    found = []
    for into in (_spare(part, 0), _starlike(part, of)):
        out = _spare(part - into, 1)
        more = into + _spare(part - into - out[:, None], 0)
        left = part - more - out[:, None]
        found.append((float(left[np.isfinite(left)].sum()), out, more))
    _, out, into = min(found, key=lambda prices: prices[0])
    return out, into


def _starlike(part: Floats, of: Whole) -> Floats:
    """What each device would be charged if links cost what their two ends cost: told by two others of its site."""
    into = np.zeros(len(part))
    for site in np.unique(of):
        mine = np.flatnonzero(of == site)
        hub = mine[0]
        into[mine] = np.where(np.isfinite(part[hub, mine]), part[hub, mine], 0.0)
        if mine.size > 2 and hub:
            other, third = mine[1], mine[2]
            known = part[[other, hub, other], [hub, third, third]]
            into[hub] = known[0] + known[1] - known[2] if np.isfinite(known).all() else 0.0
    return into


def _spare(left: Floats, axis: int) -> Floats:
    least = left.min(axis=axis, initial=INF)
    return np.where(np.isfinite(least), least, 0.0)


def _least_between(outside: Floats, of: Whole) -> Floats:
    order = np.argsort(of, kind="stable")
    begins = np.flatnonzero(np.diff(of[order], prepend=-1))
    rows = np.minimum.reduceat(outside[order], begins, axis=0)
    return np.asarray(np.minimum.reduceat(rows[:, order], begins, axis=1))


def _members(of: Whole) -> Whole:
    count = int(of.max()) + 1
    lists = [[int(j) for j in np.flatnonzero(of == site) if j] for site in range(count)]
    table = np.full((count, max(1, *(len(mine) for mine in lists))), -1, np.int64)
    for site, mine in enumerate(lists):
        table[site, : len(mine)] = mine
    return table
