"""All chains of a small fleet that some wish could prefer: label setting over several figures at once.

A label is a beginning of a chain: the set of devices used, the last of them, the blocks done, and what it has cost so far
by every figure that is asked about.  Of two labels that differ in nothing but costs, one that is no better in any of them
can be dropped: whatever completes it completes the other as well.  Costs that add up (`shoal.plan.parts`) are compared as
sums; how long a resource is taken is a sum for those that a chain may use twice (a medium, the source that runs both ends,
anything where relays are allowed) and a running maximum for the others.  So the result is exact for every figure of the
cost model, overlapping chunks, media and relays included, for which a single sum is only a bound.

What keeps the number of labels small is the caller's `Wish`: it sees the least that a label can still come to, by the
relaxation of `shoal.plan.chain`, and says which have no hope.  One set of devices is handled at a time, as arrays.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import numpy as np

from shoal.plan.arrays import Flags, Floats, Whole
from shoal.plan.budget import Budget
from shoal.plan.ground import Ground, Labels, occupy, relays_of
from shoal.plan.tables import Chain

MOST_LABELS = 1_500_000
"""Kept at once, at some 100 bytes each; beyond it the search gives up."""
PORTION = 200_000
"""Labels made in one array operation, between two questions to the budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A whole chain and the relays of its hops, as (from, to, cut) to device."""

    chain: Chain
    relays: dict[tuple[int, int, int], int]

    def via(self, devices: int, blocks: int) -> Whole:
        """[M, M, N+1] as a search's `Pass.via`."""
        found = np.full((devices, devices, blocks + 1), -1, np.int64)
        for place, relay in self.relays.items():
            found[place] = relay
        return found


class Wish(Protocol):
    """What the search is for."""

    def hopeless(self, lower: Floats) -> Flags:
        """Of each row, the least that a label can come to by each of the ground's mixtures: is it of no use?"""
        ...

    def offer(self, values: Floats, route: Callable[[int], Route]) -> None:
        """Chains that are complete, a row of measures each; *route*(i) tells the i-th."""
        ...


def explore(ground: Ground, wish: Wish, budget: Budget, most_labels: int | None = None) -> bool:
    """Offer every chain that *wish* could want; True when all sets of devices were gone through."""
    kept: dict[int, Labels] = {}
    waiting: dict[int, list[Labels]] = {1 << ground.first: [_start(ground)]}
    total, full = 0, 1 << len(ground.parts.tables.nodes)
    for mask in range(1 << ground.first, full):
        if mask not in waiting:
            continue
        if budget.spent() or total > (most_labels or MOST_LABELS):
            return False
        labels = _kept(ground, wish, _joined(waiting.pop(mask)))
        kept[mask], total = labels, total + len(labels)
        if ground.admits(mask) and len(labels):
            _finish(ground, wish, kept, mask)
        for device, grown in _grown(ground, wish, labels, mask, budget):
            waiting.setdefault(mask | 1 << device, []).append(grown)
            total += len(grown)
    return not budget.spent()


def nondominated(keys: Floats, group: Whole) -> Whole:
    """Rows of which no other row of their group is at most as large in every column; one of equal rows stays."""
    if not group.size:
        return np.zeros(0, np.int64)
    order = np.lexsort((*keys.T[::-1], group))
    keys, group = keys[order], group[order]
    starts = np.flatnonzero(np.r_[True, group[1:] != group[:-1]])
    if keys.shape[1] == 1:
        return np.asarray(order[starts])
    if keys.shape[1] == 2:
        return np.asarray(order[_falling(keys[:, 1], starts)])
    ends = np.r_[starts[1:], group.size]
    parts = [start + _minimal(keys[start:end]) for start, end in zip(starts, ends, strict=True)]
    return np.asarray(order[np.concatenate(parts)])


def _falling(values: Floats, starts: Whole) -> Flags:
    """Which values are below all before them in their group."""
    rank = np.unique(values, return_inverse=True)[1].astype(np.int64)
    groups = np.cumsum(np.bincount(starts, minlength=values.size))
    lifted = rank - groups * (values.size + 1)  # each group starts below whatever the one before it reached
    least = np.minimum.accumulate(lifted)
    fresh = np.r_[True, lifted[1:] < least[:-1]]
    fresh[starts] = True
    return np.asarray(fresh)


def _minimal(keys: Floats) -> Whole:
    """Rows of a lexicographically sorted group that no other dominates."""
    found, left = [], np.arange(len(keys))
    while left.size:
        best = left[0]  # nothing that sorts behind it can dominate it
        found.append(int(best))
        left = left[1:][(keys[left[1:]] < keys[best]).any(axis=1)]
    return np.array(found, np.int64)


def _start(ground: Ground) -> Labels:
    first = ground.first
    stops = np.flatnonzero(ground.open[first, 0])
    count = stops.size
    taken_s = np.zeros((count, ground.slots, len(ground.phases)))
    occupy(taken_s, np.full(count, ground.device_slot[first]), ground.busy_s[first, 0, stops])
    held = ground.parts.tables.takes(first, 0, stops) if ground.closes else np.zeros((count, 2))
    none = np.full(count, -1)
    return Labels(np.full(count, first), stops, none, none, ground.run[first, 0, stops], taken_s, held)


def _kept(ground: Ground, wish: Wish, labels: Labels) -> Labels:
    """Those with hope that no other dominates; better points may have turned up since they were made."""
    labels = labels.rows(~wish.hopeless(ground.lower(labels)))
    if not len(labels):
        return labels
    places = ground.parts.allowed.shape[1]
    return labels.rows(nondominated(ground.keys(labels), labels.device * places + labels.cut))


def _grown(ground: Ground, wish: Wish, labels: Labels, mask: int, budget: Budget) -> Iterator[tuple[int, Labels]]:
    if not len(labels) or mask.bit_count() >= ground.most_shards:
        return
    ways = enumerate((-1, *ground.parts.relays))
    devices = [d for d in range(len(ground.parts.tables.nodes)) if not (mask | ground.ask.forbid) >> d & 1]
    portion = 1 + PORTION // ground.parts.allowed.shape[1]
    portions = [np.arange(at, min(at + portion, len(labels))) for at in range(0, len(labels), portion)]
    for way, device, some in product(ways, devices, portions):
        if budget.spent():
            return
        grown = _step(ground, labels, device, way, some)
        grown = grown.rows(~wish.hopeless(ground.lower(grown)))
        if len(grown):
            yield device, grown


def _step(ground: Ground, labels: Labels, device: int, way: tuple[int, int], some: Whole) -> Labels:
    """*some* labels grown by a shard on *device*, reached directly or through a relay."""
    place, relay = way
    hop = ground.hop[place][labels.device[some], device, labels.cut[some]]
    at = np.flatnonzero(np.isfinite(hop[:, 0]))
    which, stop = np.nonzero(ground.open[device, labels.cut[some[at]]])
    hop, row = hop[at[which]], some[at[which]]
    cut = labels.cut[row]
    taken_s = labels.taken_s[row]
    if ground.phases:
        ground.pass_on(taken_s, (labels.device[row], device, cut), relay)
        occupy(taken_s, np.full(row.size, ground.device_slot[device]), ground.busy_s[device, cut, stop])
    return Labels(
        np.full(row.size, device), stop, np.full(row.size, relay), row,
        labels.sums[row] + hop + ground.run[device, cut, stop], taken_s, labels.held[row],
    )  # fmt: skip


def _finish(ground: Ground, wish: Wish, kept: dict[int, Labels], mask: int) -> None:
    labels = kept[mask]
    if ground.counts(mask.bit_count()):
        done = np.flatnonzero(labels.cut == ground.parts.allowed.shape[1] - 1)
        whole = labels.rows(done)
        wish.offer(ground.values(whole), lambda i: _route(kept, mask, int(done[i])))
    if ground.closes and mask != 1 << ground.first and ground.counts(mask.bit_count() + 1):
        row, whole = _closed(ground, labels)
        wish.offer(ground.values(whole), lambda i: _route(kept, mask, int(row[i]), _end(ground, whole, i)))


def _end(ground: Ground, whole: Labels, index: int) -> tuple[int, int, int]:
    return ground.first, int(whole.via[index]), ground.parts.allowed.shape[1] - 1


def _closed(ground: Ground, labels: Labels) -> tuple[Whole, Labels]:
    """Labels whose last shard goes to the first device, and of which labels they are."""
    last, first, tables = ground.parts.allowed.shape[1] - 1, ground.first, ground.parts.tables
    fits = (labels.held + tables.takes(first, labels.cut, last) <= tables.has(first)).all(axis=1)
    row = np.flatnonzero(fits & ground.open[first, labels.cut, last])
    there = labels.rows(row)
    ways, every = enumerate((-1, *ground.parts.relays)), np.arange(len(there))
    tried = [_step(ground, there, first, way, every) for way in ways]
    grown = _joined(tried)
    ended = grown.cut == last
    return row[grown.parent[ended]], grown.rows(ended)


def _route(kept: dict[int, Labels], mask: int, row: int, closing: tuple[int, int, int] | None = None) -> Route:
    """Walk back from a label, or from a shard (device, relay before it, stop) behind it, to the first one."""
    chain: list[tuple[int, int, int]] = []
    ways: list[int] = []
    stop = int(kept[mask].cut[row])
    if closing:
        chain, ways = [(closing[0], stop, closing[2])], [closing[1]]
    while row >= 0:
        labels = kept[mask]
        device, parent, way = int(labels.device[row]), int(labels.parent[row]), int(labels.via[row])
        mask ^= 1 << device
        before = int(kept[mask].cut[parent]) if parent >= 0 else 0
        chain.append((device, before, stop))
        ways += [way] if parent >= 0 else []
        stop, row = before, parent
    chain.reverse()
    return Route(chain=tuple(chain), relays=relays_of(chain, ways[::-1]))


def _joined(labels: list[Labels]) -> Labels:
    columns = ([getattr(part, name) for part in labels] for name in Labels.__dataclass_fields__)
    return Labels(*(np.concatenate(column) for column in columns))
