"""Label setting: chains grown cut by cut, each with the devices that it used, pruned by what must still be paid.

A label is a chain up to a cut.  It may be dropped when its cost with the bound on the rest (`shoal.plan.memory`, under the
prices of `shoal.plan.multipliers`) reaches the best plan known, or when another label at the same cut and device costs no more
and used no device that it did not: whatever completes the one completes the other.

At most *width* labels go on from each cut, those of the least bound.  What is dropped for that alone leaves its bound behind: the
least of them is a true bound of the whole search, and where none was dropped the best plan is proven.  So the same code is a beam
search when it is narrow and exact when it is wide.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from shoal.plan.arrays import INF, Flags, Floats, Whole
from shoal.plan.budget import Budget
from shoal.plan.memory import Remembered
from shoal.plan.moves import finish
from shoal.plan.multipliers import Asked, Priced

ROUNDING = 1e-10
"""Of the best cost: a bound that comes so near has reached it."""
PIECE = 1 << 18
"""Numbers that one array operation touches."""
ROOM = 8
"""Times the width that may wait at a cut."""
STRONG = 24
"""Labels of each device that others are compared with; comparing all pairs costs more than it prunes."""


@dataclass(frozen=True, slots=True)
class Labels:
    """Chains that wait at one cut."""

    cost: Floats
    bound: Floats
    device: Whole
    used: Flags
    """[L, M]"""
    parent: Whole
    """Number of the label that each grew from; -1: it is the first stage"""

    def take(self, some: Whole | Flags) -> "Labels":
        """Those of an index."""
        return Labels(self.cost[some], self.bound[some], self.device[some], self.used[some], self.parent[some])


@dataclass(slots=True)
class Search:
    """One run: the best chain so far, and what was dropped only because there were too many."""

    asked: Asked
    priced: Priced
    table: Remembered
    best_cost: float
    order: tuple[int, ...] | None = None
    """Devices of a chain that is better than `best_cost` was at first."""
    dropped: float = INF
    """Least bound of a label that was dropped for want of room or time."""
    kept: list[tuple[int, Whole, Whole]] = field(default_factory=list)
    """For tracing, by cut: the number of the first label, devices, parents."""

    @property
    def count(self) -> int:
        """How many labels have been kept."""
        first, devices, _ = self.kept[-1] if self.kept else (0, (), ())
        return first + len(devices)

    @property
    def limit(self) -> float:
        """A label with this bound cannot win."""
        return self.best_cost - ROUNDING * abs(self.best_cost) if np.isfinite(self.best_cost) else INF


def run(search: Search, width: int, budget: Budget) -> None:
    """Grow labels, at most *width* at each cut."""
    waiting: list[list[Labels]] = [[] for _ in search.asked.search.start]
    for stop, labels in _begin(search):
        waiting[stop].append(labels)
    for cut in range(1, len(waiting)):
        if waiting[cut]:
            labels = _kept(search, waiting[cut], width)
            waiting[cut] = []
            if not len(labels.cost):
                continue
            _complete(search, labels, cut)
            if not _all_grown(search, (cut, labels), waiting, (width, budget)):
                return


def _all_grown(
    search: Search, here: tuple[int, Labels], waiting: list[list[Labels]], effort: tuple[int, Budget]
) -> bool:
    """Let the labels of a cut grow; False when the budget ran out, and the rest is dropped."""
    (cut, labels), (width, budget) = here, effort
    size, step = len(labels.cost), max(1, PIECE // (8 * labels.used.shape[1]))
    numbers = np.arange(size) + search.count
    search.kept.append((search.count, labels.device, labels.parent))
    for low in range(0, size, step):
        if budget.spent():
            search.dropped = min(search.dropped, float(labels.bound[low:].min()), *_least(waiting))
            return False
        some = np.arange(low, min(low + step, size))
        for stop, grown in _grow(search, labels.take(some), numbers[some], cut):
            waiting[stop].append(grown)
            # What waits is held to a small multiple of the width, or memory would go before time does.
            if sum(len(part.cost) for part in waiting[stop]) > ROOM * width:
                waiting[stop] = [_kept(search, waiting[stop], width)]
    return True


def _least(waiting: list[list[Labels]]) -> Iterator[float]:
    return (float(labels.bound.min()) for bucket in waiting for labels in bucket)


def _begin(search: Search) -> Iterator[tuple[int, Labels]]:
    asked, devices = search.asked.search, len(search.asked.tables.nodes)
    used = np.zeros((1, devices), bool)
    used[0, asked.first] = True
    paid = search.priced.prices[-1] - search.priced.credit
    for stop in np.flatnonzero(np.isfinite(asked.start)):
        cost = asked.start[stop : stop + 1]
        bound = cost + paid + search.table.to_go[stop, asked.first, 0]
        if bound[0] < search.limit:
            yield int(stop), Labels(cost, bound, np.array([asked.first]), used, np.array([-1]))


def _kept(search: Search, bucket: list[Labels], width: int) -> Labels:
    """Those of a cut that go on; there may be none."""
    names = Labels.__slots__
    labels = Labels(*(np.concatenate([getattr(part, name) for part in bucket]) for name in names))
    labels = labels.take(labels.bound < search.limit)
    labels = labels.take(_distinct(labels))
    if not search.asked.limits.counts_down:
        labels = labels.take(_undominated(labels))
    if len(labels.cost) > width:
        order = np.argsort(labels.bound, kind="stable")
        search.dropped = min(search.dropped, float(labels.bound[order[width]]))
        labels = labels.take(order[:width])
    return labels


def _distinct(labels: Labels) -> Whole:
    """The cheapest of each device and set."""
    keys = [labels.cost, labels.device, *_words(labels.used).T]
    order = np.lexsort(keys)
    rest = np.stack([key[order] for key in keys[1:]])
    new = np.ones(len(order), bool)
    new[1:] = (rest[:, 1:] != rest[:, :-1]).any(axis=0)
    return order[new]


def _undominated(labels: Labels) -> Flags:
    """Without those of a device that a cheap label with fewer devices is as good as."""
    alive, words = np.ones(len(labels.cost), bool), _words(labels.used)
    for device in np.unique(labels.device):
        group = np.flatnonzero(labels.device == device)
        group = group[np.argsort(labels.cost[group], kind="stable")]
        for rank in range(min(STRONG, len(group) - 1)):
            strong, others = group[rank], group[rank + 1 :]
            if alive[strong]:
                alive[others[(words[strong] & ~words[others] == 0).all(axis=1)]] = False
    return alive


def _words(used: Flags) -> Whole:
    packed = np.packbits(used, axis=1)
    room = np.zeros((len(used), -(-packed.shape[1] // 8) * 8), np.uint8)
    room[:, : packed.shape[1]] = packed
    return room.view(np.int64)


def _complete(search: Search, labels: Labels, cut: int) -> None:
    """Take the cheapest of the labels that may end here."""
    total = labels.cost + finish(search.asked.search)[labels.device, cut]
    total[~search.asked.limits.met(labels.used, closes=search.asked.search.close is not None)] = INF
    winner = int(np.argmin(total))
    if total[winner] < search.best_cost:
        search.best_cost = float(total[winner])
        search.order = _trace(search, labels, winner)


def _trace(search: Search, labels: Labels, index: int) -> tuple[int, ...]:
    order, parent = [int(labels.device[index])], int(labels.parent[index])
    firsts = [first for first, _, _ in search.kept]
    while parent >= 0:
        first, devices, parents = search.kept[bisect_right(firsts, parent) - 1]
        order.append(int(devices[parent - first]))
        parent = int(parents[parent - first])
    return tuple(reversed(order))


def _grow(search: Search, labels: Labels, numbers: Whole, cut: int) -> Iterator[tuple[int, Labels]]:
    """Open one more device after each label, in every length that can still win."""
    asked, table, prices = search.asked.search, search.table, search.priced.prices
    paid = labels.used @ prices[:-1] + labels.used.sum(axis=1) * prices[-1] - search.priced.credit
    cost = labels.cost[:, None] + asked.hop[labels.device, :, cut]
    cost[labels.used] = INF
    cost[labels.used.sum(axis=1) >= search.asked.limits.most_devices(closes=asked.close is not None)] = INF
    sets = _sets(table, labels.used)
    bound = cost + paid[:, None] + table.to_open[cut, np.arange(cost.shape[1]), sets]
    who, device = np.nonzero(bound < search.limit)
    step = max(1, PIECE // (4 * asked.start.size))
    for low in range(0, len(who), step):
        row, next_device = who[low : low + step], device[low : low + step]
        used = labels.used[row]
        used[np.arange(len(row)), next_device] = True
        opened = Labels(cost[row, next_device], paid[row], next_device, used, numbers[row])
        yield from _stopped(search, opened, sets[row, next_device], cut)


def _stopped(search: Search, opened: Labels, sets: Whole, cut: int) -> Iterator[tuple[int, Labels]]:
    """Labels by where their last shard stops; *opened* stand before it, with what they have paid in prices as their bound."""
    asked, table, prices, device = search.asked.search, search.table, search.priced.prices, opened.device
    total = opened.cost[:, None] + asked.run[device, cut, cut + 1 :]
    ahead = table.to_go[cut + 1 :, device, sets].T
    bound = total + ahead + (opened.bound + prices[device] + prices[-1])[:, None]
    column, row = np.nonzero((bound < search.limit).T)
    edges = np.flatnonzero(np.diff(column, prepend=-1, append=-1))
    for low, high in pairwise(edges):
        rows, place = row[low:high], int(column[low])
        grown = opened.take(rows)
        yield cut + 1 + place, replace(grown, cost=total[rows, place], bound=bound[rows, place])


def _sets(table: Remembered, used: Flags) -> Whole:
    """[L, M] the set that each device's neighbours are in."""
    sets = np.zeros(used.shape, np.int64)
    for bit in range(max(len(known) for known in table.neighbours)):
        with_bit = np.array([bit < len(known) for known in table.neighbours])
        other = np.array([known[bit] if bit < len(known) else 0 for known in table.neighbours])
        sets |= (used[:, other] & with_bit).astype(np.int64) << bit
    return sets
