"""A bound for crowds: what a chain costs when it may come back to a site, and forgets which devices it used there.

A chain is a row of visits to sites.  What one visit costs at least, by its units, is a knapsack over the devices of the site under
the prices of `shoal.plan.sites`: one of them is entered from outside, one left to the outside (or ends the chain), no device serves
twice.  Visits are joined by a shortest path over (site, units done).  Each device costs a price besides, and a stage, which are
handed back once: a true bound for any prices (as in `shoal.plan.multipliers`), and exact where no device is visited twice.

Tables are indexed [row, entered, left (0 not yet, 1 to another site, 2 the chain ends), units].  Rows: a visit to each site; the
rest of a visit that has begun; and the visit with which the chain begins.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from shoal.plan.arrays import INF, Floats, Whole
from shoal.plan.lineup import Lineup
from shoal.plan.sites import Sites

OPEN, OUT, LAST = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """[R] each, of the devices in one slot of the rows that have one there: `x_y` entered from x and left to y."""

    rows: Whole
    devices: Whole
    unit: Floats
    room: Whole
    room_last: Whole
    in_in: Floats
    out_in: Floats
    in_out: Floats
    out_out: Floats
    in_last: Floats
    out_last: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Visits:
    """The relaxation under prices."""

    line: Lineup
    sites: Sites
    prices: Floats
    """[M + 1] each device's, the first's unused, and a stage's"""
    credit: float
    slots: tuple[Costs, ...]
    before: tuple[Floats, ...]
    """The rows of each slot before it"""
    table: Floats
    """After all slots"""
    to_go: Floats
    """[U+1, G] after a site was left"""
    opens: Floats
    """[U+1, G] before it is entered"""
    inside: Floats
    """[U+1, G] where more of its devices follow"""
    bound: float


def relaxed(line: Lineup, sites: Sites, prices: Floats) -> Visits:
    """The cheapest row of visits."""
    rows = _rows(sites)
    slots = tuple(_costs(line, sites, prices, rows[:, slot]) for slot in range(rows.shape[1]))
    table, before = _seeds(line, sites), []
    for costs in slots:
        before.append(table[costs.rows])
        table[costs.rows] = _with(before[-1], costs, line.least_last)
    count = len(sites.between)
    to_go, opens, inside = _onward(table[:, 1], sites.between)
    begin = table[2 * count, 1]
    home = int(sites.of[0])
    whole = min(float(begin[LAST, -1]), float((begin[OUT] + to_go[:, home]).min()))
    credit = handed_back(line, prices)
    return Visits(
        line=line,
        sites=sites,
        prices=prices,
        credit=credit,
        slots=slots,
        before=tuple(before),
        table=table,
        to_go=to_go,
        opens=opens,
        inside=inside,
        bound=whole + float(prices[-1]) - credit,
    )


def handed_back(line: Lineup, prices: Floats) -> float:
    """The most that a chain gets back; a price below 0 is paid to those that must take part."""
    stage = float(prices[-1])
    return float(prices[1:-1].sum()) + stage * (line.stages[1] if stage > 0 else line.stages[0])


def _rows(sites: Sites) -> Whole:
    home = sites.members[int(sites.of[0])]
    return np.concatenate([sites.members, sites.members, home[None]])


def _costs(line: Lineup, sites: Sites, prices: Floats, slot: Whole) -> Costs:
    rows = np.flatnonzero(slot >= 0)
    devices = slot[rows]
    base = line.opening[devices] + prices[:-1][devices] + prices[-1]
    inward, outward = sites.receives_in[devices], sites.receives_out[devices]
    on, away, end = sites.sends_in[devices], sites.sends_out[devices], line.end[devices]
    return Costs(
        rows=rows,
        devices=devices,
        unit=line.unit[devices],
        room=line.room[devices],
        room_last=line.room_last[devices],
        in_in=base + inward + on,
        out_in=base + outward + on,
        in_out=base + inward + away,
        out_out=base + outward + away,
        in_last=base + inward + end,
        out_last=base + outward + end,
    )


def _seeds(line: Lineup, sites: Sites) -> Floats:
    count = len(sites.between)
    seeds = np.full((2 * count + 1, 2, 3, line.units + 1), INF)
    seeds[:count, 0, OPEN, 0] = 0.0
    seeds[count : 2 * count, 1, OPEN, 0] = 0.0
    seeds[2 * count, 1, OPEN] = line.start + sites.sends_in[0]
    seeds[2 * count, 1, OUT] = line.start + sites.sends_out[0]
    return seeds


def _with(before: Floats, costs: Costs, least_last: int) -> Floats:
    """After the devices of one slot have taken some, or nothing."""
    some = _taken(before, costs.unit, (1, costs.room))
    ends = _taken(before[:, :, OPEN], costs.unit, (least_last, costs.room_last))
    after = np.minimum(before, some + costs.in_in[:, None, None, None])
    _lower(after[:, 1], some[:, 0] + costs.out_in[:, None, None])
    _lower(after[:, :, OUT], some[:, :, OPEN] + costs.in_out[:, None, None])
    _lower(after[:, 1, OUT], some[:, 0, OPEN] + costs.out_out[:, None])
    _lower(after[:, :, LAST], ends + costs.in_last[:, None, None])
    _lower(after[:, 1, LAST], ends[:, 0] + costs.out_last[:, None])
    return after


def _lower(into: Floats, other: Floats) -> None:
    np.minimum(into, other, out=into)


def _taken(before: Floats, unit: Floats, limits: tuple[int, Whole]) -> Floats:
    """[R, ..., U+1] cheapest after `limits` units more: from a number to one for each row."""
    least, room = limits
    after = np.full_like(before, INF)
    last = before.shape[-1] - 1
    shape = (-1, *(1,) * (before.ndim - 1))
    for took in range(least, min(int(room.max(initial=0)), last) + 1):
        cost = np.where(room >= took, unit * took, INF).reshape(shape)
        _lower(after[..., took:], before[..., : last + 1 - took] + cost)
    return after


def _given(after: Floats, unit: Floats, limits: tuple[int, Whole]) -> Floats:
    """As `_taken`, backwards: [R, ..., U+1] cheapest to go on when some are taken now."""
    return _taken(after[..., ::-1], unit, limits)[..., ::-1]


def _onward(visits: Floats, between: Floats) -> tuple[Floats, Floats, Floats]:
    """[U+1, G] each: what remains after leaving, before entering, and within a site."""
    count, units = len(between), visits.shape[2] - 1
    out, last = visits[:count, OUT].T.copy(), visits[:count, LAST].T
    more, more_last = visits[count : 2 * count, OUT].T.copy(), visits[count : 2 * count, LAST].T
    longest = int(np.flatnonzero(np.isfinite(out).any(axis=1)).max(initial=0))
    to_go = np.full((units + 1, count), INF)
    opens, inside = to_go.copy(), to_go.copy()
    for done in range(units, -1, -1):
        steps = min(longest, units - done)
        ahead = to_go[done + 1 : done + 1 + steps]
        opens[done] = np.minimum(last[units - done], (out[1 : steps + 1] + ahead).min(axis=0, initial=INF))
        inside[done] = np.minimum(more_last[units - done], (more[1 : steps + 1] + ahead).min(axis=0, initial=INF))
        to_go[done] = (between + opens[done]).min(axis=1)
    return to_go, opens, inside


def path_of(visits: Visits) -> list[int]:
    """The devices behind the bound, the first aside, in no order within a visit."""
    count, units = len(visits.sites.between), visits.line.units
    table, site, done, row = visits.table[:, 1], int(visits.sites.of[0]), 0, 2 * count
    path: list[int] = []
    while True:
        out = table[row, OUT, : units - done + 1] + visits.to_go[done:, site]
        took = int(np.argmin(out))
        ends = table[row, LAST, units - done] <= out[took]
        path += _within(visits, row, (LAST if ends else OUT, units - done if ends else took))
        if ends:
            return path
        done += took
        site = int(np.argmin(visits.sites.between[site] + visits.opens[done]))
        row = site


def _within(visits: Visits, row: int, state: tuple[int, int]) -> Iterator[int]:
    entered, (left, units) = 1, state
    after = visits.table[row]
    for slot in range(len(visits.slots) - 1, -1, -1):
        place = int(np.searchsorted(visits.slots[slot].rows, row))
        if place == visits.slots[slot].rows.size or visits.slots[slot].rows[place] != row:
            continue
        before = visits.before[slot][place]
        if before[entered, left, units] > after[entered, left, units]:
            yield int(visits.slots[slot].devices[place])
            entered, left, units = _step(visits, (slot, place), (entered, left, units))
        after = before


def _step(visits: Visits, where: tuple[int, int], state: tuple[int, int, int]) -> tuple[int, int, int]:
    """The state before the device in this slot and place."""
    (slot, place), (entered, left, units) = where, state
    costs, before = visits.slots[slot], visits.before[slot][place]
    ways = [(entered, left, costs.in_in)]
    if entered:
        ways.append((0, left, costs.out_in))
    if left:
        ways.append((entered, OPEN, costs.in_out if left == OUT else costs.in_last))
        if entered:
            ways.append((0, OPEN, costs.out_out if left == OUT else costs.out_last))
    found = []
    for came, was, cost in ways:
        ends = left == LAST and was == OPEN
        room = int((costs.room_last if ends else costs.room)[place])
        for took in range(visits.line.least_last if ends else 1, min(room, units) + 1):
            total = before[came, was, units - took] + cost[place] + costs.unit[place] * took
            found.append((float(total), came, was, units - took))
    return min(found)[1:]


def forced(visits: Visits) -> Floats:
    """[M] the bound of chains with each device; that of all for the first."""
    line, count = visits.line, len(visits.sites.between)
    context = _contexts(visits)
    found = np.full(line.devices.size, INF)
    for slot in range(len(visits.slots) - 1, -1, -1):
        costs = visits.slots[slot]
        with_it = _onto(context[costs.rows], costs, line.least_last)
        least = (visits.before[slot] + with_it).min(axis=(1, 2, 3))
        there = (costs.rows < count) | (costs.rows == 2 * count)
        np.minimum.at(found, costs.devices[there], least[there])
        context[costs.rows] = np.minimum(context[costs.rows], with_it)
    found += float(visits.prices[-1]) - visits.credit
    found[0] = visits.bound
    return found


def _onto(context: Floats, costs: Costs, least_last: int) -> Floats:
    """What remains when the devices of a slot take some now."""
    some = _given(context, costs.unit, (1, costs.room))
    ends = _given(context[:, :, LAST], costs.unit, (least_last, costs.room_last))
    with_it = some + costs.in_in[:, None, None, None]
    _lower(with_it[:, 0], some[:, 1] + costs.out_in[:, None, None])
    _lower(with_it[:, :, OPEN], some[:, :, OUT] + costs.in_out[:, None, None])
    _lower(with_it[:, 0, OPEN], some[:, 1, OUT] + costs.out_out[:, None])
    _lower(with_it[:, :, OPEN], ends + costs.in_last[:, None, None])
    _lower(with_it[:, 0, OPEN], ends[:, 1] + costs.out_last[:, None])
    return with_it


def _contexts(visits: Visits) -> Floats:
    """[R, 2, 3, U+1] what the rest of a chain costs around a visit with so many units; infinite while it goes on."""
    line, between, count = visits.line, visits.sites.between, len(visits.sites.between)
    final, units, home = visits.table[:, 1], line.units, int(visits.sites.of[0])
    left, arrive = np.full((units + 1, count), INF), np.full((units + 1, count), INF)
    left[:, home] = final[2 * count, OUT]
    out = final[:count, OUT].T.copy()
    for done in range(units + 1):
        arrive[done] = (left[done][:, None] + between).min(axis=0)
        _lower(left[done + 1 :], arrive[done] + out[1 : units + 1 - done])
    context = np.full_like(visits.table, INF)
    for took in range(units + 1):
        around = arrive[: units + 1 - took] + visits.to_go[took:]
        context[:count, 1, OUT, took] = around.min(axis=0)
        context[:count, 1, LAST, took] = arrive[units - took]
    context[2 * count, 1, OUT] = visits.to_go[:, home]
    context[2 * count, 1, LAST, units] = 0.0
    return context
