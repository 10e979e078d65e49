"""Local moves on a chain: never worse than the start, for fleets that are too large to prove anything about.

Only the order of the devices is changed; the best cuts of an order are a small dynamic programme over (device in the order,
blocks done), so that shifting boundaries is no move of its own.  Two kinds of moves:

- between a kept beginning and a kept end, nothing or one unused device: swap, insert, drop, or shorten.  The costs of all
  beginnings and ends are tables, so all devices are tried at once.
- rearrange what is used: reverse a segment, move one device, exchange two.

Of all moves that begin after the same device the best is taken; it stops when none improves.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from shoal.plan.arrays import INF, Floats
from shoal.plan.budget import Budget
from shoal.plan.found import Choice
from shoal.plan.tables import Chain, Pass, Tables

REACH = 12
"""Devices that one rearrangement may touch: longer ones cost much and seldom help."""
ENOUGH = 1e-9
"""Relative gain below which a move is rounding."""

Order = tuple[int, ...]
"""Devices of a chain, without the closing stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What an order must satisfy beside cost."""

    tables: Tables
    search: Pass
    choice: Choice

    def admit(self, order: Order) -> bool:
        """May an order of these devices be?"""
        stages = len(order) + int(self.search.close is not None and len(order) > 1)
        counted = stages <= self.tables.max_stages and self.tables.stages_exactly in {0, stages}
        return counted and self.choice.admits(sum(1 << device for device in order))


def improve(rules: Rules, start: Chain, budget: Budget) -> tuple[float, Chain]:
    """The best chain that moves from *start* reach, and its cost; *start* is a chain of the pass."""
    closes = rules.search.close is not None
    order = tuple(device for device, _, _ in (start[:-1] if closes else start))
    cost, chain = cut_best(rules.search, order)
    cost, chain = cut_best(rules.search, order)
    left, quiet = 0, 0
    while quiet < len(order) and not budget.spent():
        better = _replaced(rules, order, left, cost) or _rearranged(rules, order, left, cost)
        if better is None:
            left, quiet = left + 1, quiet + 1
        else:
            order, quiet = better, 0
            cost, chain = cut_best(rules.search, order)
        left %= len(order)
    return cost, chain


def cut_best(search: Pass, order: Order) -> tuple[float, Chain]:
    """The cheapest chain over these devices in this order; infinite when there is none."""
    done = _beginnings(search, order)
    total = done[-1] + finish(search)[order[-1]]
    stop, blocks = int(np.argmin(total)), search.start.size - 1
    if not np.isfinite(total[stop]):
        return INF, ()
    chain = [] if search.close is None else [(search.first, stop, blocks)]
    for position in range(len(order) - 1, 0, -1):
        here, before = order[position], order[position - 1]
        start = int(np.argmin(done[position - 1] + search.hop[before, here] + search.run[here, :, stop]))
        chain.append((here, start, stop))
        stop = start
    return float(total.min()), (*[(search.first, 0, stop)], *reversed(chain))


def chain_cost(search: Pass, chain: Chain) -> float:
    """What the pass asks for a chain; infinite when it is not one of its own."""
    closes = search.close is not None
    if chain[0][0] != search.first or (closes and (len(chain) < 2 or chain[-1][0] != search.first)):
        return INF
    middle = chain[1:-1] if closes else chain[1:]
    cost = float(search.start[chain[0][2]])
    for (before, _, _), (device, start, stop) in zip(chain, middle, strict=False):
        cost += float(search.hop[before, device, start] + search.run[device, start, stop])
    last, _, stop = chain[-2] if closes else chain[-1]
    return cost + float(finish(search)[last, stop])


def finish(search: Pass) -> Floats:
    """[M, N+1] cost to finish after a device has stopped at a cut, without opening another one."""
    if search.close is not None:
        return np.asarray(search.hop[:, search.first] + search.close)
    ends = np.full(search.hop.shape[1:], INF)
    ends[:, -1] = search.end
    return ends


def _beginnings(search: Pass, order: Order) -> list[Floats]:
    """Cost [N+1] after each device of the order, by where it stops."""
    done = [search.start]
    for before, here in pairwise(order):
        arrive = done[-1] + search.hop[before, here]
        done.append((arrive[:, None] + search.run[here]).min(axis=0))
    return done


def _ends(search: Pass, order: Order) -> list[Floats]:
    """Cost to finish [M, N+1] when a device has stopped and the order goes on at each position, or ends (last)."""
    ends = [finish(search)]
    for position in range(len(order) - 1, 0, -1):
        here = order[position]
        onward = (search.run[here] + ends[0][here]).min(axis=1)
        ends.insert(0, search.hop[:, here] + onward)
    return ends


def _replaced(rules: Rules, order: Order, left: int, cost: float) -> Order | None:
    """The best order that has one unused device, or none, between its beginning up to *left* and an end of this one."""
    search, ends = rules.search, _ends(rules.search, order)
    done = _beginnings(search, order[: left + 1])[-1]
    arrive = done + search.hop[order[left]]
    reached = np.stack([(row[:, None] + run).min(axis=0) for row, run in zip(arrive, search.run, strict=True)])
    reached[list(order)] = INF
    best: tuple[float, Order | None] = (cost * (1 - ENOUGH), None)
    for right in range(left, len(order)):
        through = (reached + ends[right]).min(axis=1)
        device = int(np.argmin(through))
        straight = float((done + ends[right][order[left]]).min())
        for rival, put in ((float(through[device]), (device,)), (straight, ())):
            changed = (*order[: left + 1], *put, *order[right + 1 :])
            if rival < best[0] and rules.admit(changed):
                best = (rival, changed)
    return best[1]


def _rearranged(rules: Rules, order: Order, left: int, cost: float) -> Order | None:
    """The best order of the same devices that one move just after *left* reaches."""
    search, ends = rules.search, _ends(rules.search, order)
    done = _beginnings(search, order[: left + 1])[-1]
    best: tuple[float, Order | None] = (cost * (1 - ENOUGH), None)
    for right, middle in _shuffles(order, left):
        reached, before = done, order[left]
        for here in middle:
            reached = ((reached + search.hop[before, here])[:, None] + search.run[here]).min(axis=0)
            before = here
        rival = float((reached + ends[right][before]).min())
        if rival < best[0]:
            best = (rival, (*order[: left + 1], *middle, *order[right + 1 :]))
    return best[1]


def _shuffles(order: Order, left: int) -> Iterator[tuple[int, Order]]:
    """Other orders of the devices after *left* up to some position: reversed, one moved to either end, the ends exchanged."""
    for right in range(left + 2, min(len(order), left + 1 + REACH)):
        part = order[left + 1 : right + 1]
        yield right, part[::-1]
        if len(part) > 2:
            yield right, (*part[1:], part[0])
            yield right, (part[-1], *part[:-1])
        if len(part) > 3:
            yield right, (part[-1], *part[1:-1], part[0])
