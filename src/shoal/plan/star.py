"""Polynomial solvers for blocks that repeat (period 1): what a chain costs if links are forgotten down to their ends.

Give each device a price of sending and one of receiving whose sum never exceeds the cost of the link between two devices.  The
cheapest choice of devices and units under these prices is a knapsack, solved exactly in devices x units x room, and a bound for
every chain.  On a star, where a link costs what its two ends cost, prices are the costs and the bound is the optimum: any order of
the chosen devices will do.  Elsewhere the bound says which devices, and which links, no good chain can have.

For throughput, a period of T leaves links that are quick enough and whole units for each device: where the devices that the source
still reaches cannot hold the model, no chain has that period.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from shoal.plan.arrays import INF, Floats
from shoal.plan.found import Choice
from shoal.plan.periodic import SAME, Periodic
from shoal.plan.tables import Chain

Part = tuple[int, int, int]
"""A device, its units, and whether it is last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """[M] each: `sends[i] + receives[j]` is at most the cost of a link from i to j."""

    sends: Floats
    receives: Floats
    exact: bool
    """Every link costs just that: a star."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """The cheapest choice of two devices or more under prices."""

    bound: float
    parts: tuple[Part, ...]
    forced: Floats
    """[M] the least of choices with this device in the middle or last"""


def applies(form: Periodic) -> bool:
    return form.rhythm.period == 1 and len(form.ends) == 1 and form.ends[0].again is None


def prices(form: Periodic, devices: list[int]) -> Prices:
    """Those of a star where the links among *devices* are one, else what receivers, then senders, can be charged at most."""
    first, hop = form.ends[0].device, form.hop[:, :, 0]
    rows = [first, *devices]
    part = np.where(np.equal.outer(rows, devices), INF, hop[np.ix_(rows, devices)])
    for into in (part[0], part.min(axis=0, initial=INF)):
        into = np.where(np.isfinite(into), into, 0.0)
        out = _spare(part - into, 1)
        into = into + _spare(part - into - out[:, None], 0)
        left = (part - into - out[:, None])[~np.equal.outer(rows, devices)]
        exact = bool((np.abs(left) <= SAME * np.abs(hop[np.isfinite(hop)]).max(initial=0)).all())
        if exact:
            break
    sends, receives = np.full(len(hop), INF), np.full(len(hop), INF)
    sends[rows], receives[devices] = out, into
    return Prices(sends=sends, receives=receives, exact=exact)


def _spare(left: Floats, axis: int) -> Floats:
    """What all links of a device have left; nothing where it has none."""
    least = left.min(axis=axis, initial=INF)
    return np.where(np.isfinite(least), least, 0.0)


def fill(form: Periodic, charged: Prices, devices: list[int], choice: Choice) -> Filled:
    """The knapsack: its optimum, and the optimum with each device."""
    first, units = form.ends[0].device, form.rhythm.units
    opened = np.full((2, units + 1), INF)
    room = int(form.ends[0].room[0])
    taken = np.arange(int(not form.rhythm.first), room + 1)
    begin = form.ends[0].entry + form.opening[first] + form.before[first] + charged.sends[first]
    if taken.size:
        opened[0, taken] = begin + form.unit[first] * taken
    prefix = [opened]
    for device in devices:
        grown = _with(form, charged, device, prefix[-1])
        prefix.append(grown if choice.require >> device & 1 else np.minimum(prefix[-1], grown))
    closed = np.full((2, units + 1), INF)
    closed[0, 0] = 0.0
    suffix = [closed]
    for device in reversed(devices):
        grown = _with(form, charged, device, suffix[-1])
        suffix.append(grown if choice.require >> device & 1 else np.minimum(suffix[-1], grown))
    suffix.reverse()
    forced = np.full(len(form.opening), INF)
    for place, device in enumerate(devices):
        here = _with(form, charged, device, prefix[place])
        forced[device] = _joined(here, suffix[place + 1])
    bound = float(prefix[-1][1, units])
    parts = tuple(_traced(form, charged, devices, prefix)) if np.isfinite(bound) else ()
    return Filled(bound=bound, parts=parts, forced=forced)


def _with(form: Periodic, charged: Prices, device: int, before: Floats) -> Floats:
    """[2 whether a last one is among them, U+1 units] after this device has taken some."""
    middle = charged.receives[device] + charged.sends[device] + form.opening[device]
    last = charged.receives[device] + form.opening[device] + form.after[device] + form.ends[0].end[device]
    least = int(not form.rhythm.last)
    unit = float(form.unit[device])
    return np.stack(
        [
            middle + _taken(before[0], unit, 1, int(form.room[device, 0, 0])),
            np.minimum(
                middle + _taken(before[1], unit, 1, int(form.room[device, 0, 0])),
                last + _taken(before[0], unit, least, int(form.room_last[device, 0])),
            ),
        ]
    )


def _taken(before: Floats, unit: float, least: int, most: int) -> Floats:
    """[U+1] cheapest with *least* to *most* units more."""
    most = min(most, before.size - 1)
    if most < least:
        return np.full(before.size, INF)
    padded = np.concatenate([np.full(most, INF), before])
    costs = unit * np.arange(most, least - 1, -1)
    windows = sliding_window_view(padded, most - least + 1)[: before.size]
    return np.asarray((windows + costs).min(axis=1))


def _joined(one: Floats, other: Floats) -> float:
    """Both together have all units, and one last device."""
    back = other[:, ::-1]
    return float(min((one[0] + back[1]).min(), (one[1] + back[0]).min()))


def _traced(form: Periodic, charged: Prices, devices: list[int], prefix: list[Floats]) -> Iterator[Part]:
    """The parts behind the optimum, the last device first where the walk meets it."""
    ended, units = 1, form.rhythm.units
    for place in range(len(devices) - 1, -1, -1):
        device, value = devices[place], prefix[place + 1][ended, units]
        if prefix[place][ended, units] == value:
            continue
        took, closes = _step(form, charged, device, (prefix[place], ended, units))
        yield device, took, int(closes)
        ended, units = ended - closes, units - took
    yield form.ends[0].device, units, 0


def _step(form: Periodic, charged: Prices, device: int, state: tuple[Floats, int, int]) -> tuple[int, int]:
    before, ended, units = state
    middle = charged.receives[device] + charged.sends[device] + form.opening[device]
    last = charged.receives[device] + form.opening[device] + form.after[device] + form.ends[0].end[device]
    ways = [
        (before[ended, units - x] + middle + form.unit[device] * x, x, 0)
        for x in range(1, min(units, int(form.room[device, 0, 0])) + 1)
    ]
    if ended:
        ways += [
            (before[0, units - x] + last + form.unit[device] * x, x, 1)
            for x in range(int(not form.rhythm.last), min(units, int(form.room_last[device, 0])) + 1)
        ]
    _, took, closes = min(ways)
    return took, closes


def chain_of(form: Periodic, parts: tuple[Part, ...]) -> Chain:
    """The chosen devices in an order that goes on to the nearest."""
    first = form.ends[0].device
    took = {device: units for device, units, _ in parts}
    last = next(device for device, _, closes in parts if closes)
    waiting = [device for device, _, closes in parts if device != first and not closes]
    order = [first]
    while waiting:
        order.append(min(waiting, key=lambda there: float(form.hop[order[-1], there, 0])))
        waiting.remove(order[-1])
    chain: list[tuple[int, int, int]] = []
    unit = 0
    for device in order:
        start = form.rhythm.cut(unit, 0) if chain else 0
        unit += took[device]
        chain.append((device, start, form.rhythm.cut(unit, 0)))
    blocks = form.rhythm.first + form.rhythm.units + form.rhythm.last
    return (*chain, (last, form.rhythm.cut(unit, 0), blocks))


def period_bound_s(busy: Periodic) -> float:
    """No chain keeps its busiest device or link for less: *busy* has seconds of occupation for costs.

    Exact on a star whose only limits these are: its quick devices are all joined with each other, one more may be last.
    """
    longest = float(np.where(np.isfinite(busy.hop), busy.hop, 0.0).max(initial=0.0))
    low, high = 0.0, longest + float((busy.opening + busy.unit * (busy.rhythm.units + 1)).max())
    if not _holds(busy, high):
        return INF
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _holds(busy, middle) else (middle, high)
    return low


def _holds(busy: Periodic, period_s: float) -> bool:
    """Whether the devices that the first one reaches by quick links have room for all units."""
    first = busy.ends[0].device
    pinned_s = busy.opening[first] + (
        busy.before[first] if busy.rhythm.first else busy.unit[first] * (busy.rhythm.period == 1)
    )
    if len(busy.ends) == 1 and pinned_s > period_s * (1 + 1e-12):
        return False
    quick = busy.hop.min(axis=2) <= period_s
    reached, edge = {first}, [first]
    while edge:
        found = set(np.flatnonzero(quick[edge].any(axis=0)).tolist()) - reached
        reached, edge = reached | found, sorted(found)
    slow = busy.unit > 0
    can = np.floor((period_s - busy.opening) / np.where(slow, busy.unit, 1.0) * (1 + 1e-12))
    can = np.where(slow, can, busy.rhythm.units)
    room = np.maximum(busy.room.max(axis=(1, 2)), busy.room_last.max(axis=1))
    ends = busy.ends[0]
    room[first] = max(int(ends.room.max()), busy.rhythm.units if np.isfinite(ends.alone) else 0)
    if ends.again is not None:
        room[first] = max(room[first], int(ends.again.max()))
    return float(np.clip(can, 0, np.maximum(room, 0))[sorted(reached)].sum()) >= busy.rhythm.units
