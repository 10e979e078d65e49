"""The least busiest stage or link over chains, as EdgeShard and PipeEdge search it: the lap is not looked at.

EdgeShard's throughput problem (arXiv 2405.14371, section IV) goes over states (blocks done, set of devices, last device);
PipeEdge's scheduler over (blocks done, how many devices of each class, last class).  The second is the first with like devices
counted, so one search serves both: a group holds devices that count as alike.  Memory is exact, as a shard is opened whole.

What they leave out is the feedback: a token needs its predecessor, so with few micro-batches in flight the lap binds, not the
busiest stage.  Many chains share the least bottleneck; the one of the shortest lap is taken, which is their best case.

The table grows with the product of the groups' sizes: beyond `WORK_LIMIT` there is no answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from shoal.plan.arrays import INF, Floats, Whole
from shoal.plan.tables import Chain, Pass, Tables, cost_passes

WORK_LIMIT = 2_500_000_000
"""Additions or comparisons of one search; some 2 ns each.  15 unlike devices and 82 blocks take 1.7e9."""

Group = tuple[int, ...]
"""Devices that count as alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measure:
    """What one search adds up, or takes the greatest of.  Index 0 among the ends of hops is the first device, groups follow."""

    add: bool
    start: Floats
    """[N+1]"""
    run: Floats
    """[G, N+1, N+1]"""
    hop: Floats
    """[G+1, G+1, N+1]"""
    end: Floats
    """[G+1]"""
    close: Floats | None
    """[N+1] last stage on the first device; as in `Pass`"""

    def joined(self, one: Floats, other: Floats) -> Floats:
        return one + other if self.add else np.maximum(one, other)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counts:
    """States: how many devices of each group are used, as one mixed-radix number."""

    digits: Whole
    """[S, G]"""
    strides: Whole
    """[G]"""
    sizes: Whole
    """[G]"""


def least_bottleneck(tables: Tables, groups: Sequence[Group]) -> Chain | None:
    """The chain whose busiest device or link is least busy, the shortest lap among those; None: none, or too much work."""
    passes = list(cost_passes(tables))
    if not passes or len(passes) * _work(groups, passes[0]) > WORK_LIMIT:
        return None
    found = [(_search(tables, search, groups, add=False), search.first) for search in passes]
    busiest_s, chain = min((answer for answer, _ in found), key=lambda answer: answer[0])
    if chain is None:
        return None
    capped = cost_passes(tables, cap_s=busiest_s)
    shortest = min((_search(tables, search, groups, add=True) for search in capped), default=(INF, None), key=_cost)
    return shortest[1] or chain


def _cost(answer: tuple[float, Chain | None]) -> float:
    return answer[0]


def _work(groups: Sequence[Group], search: Pass) -> int:
    others = _others(groups, search)
    return prod(len(group) + 1 for group in others) * len(others) * search.start.size**2


def _others(groups: Sequence[Group], search: Pass) -> list[Group]:
    """The groups without the first device, which is used from the start."""
    return [left for group in groups if (left := tuple(d for d in group if d != search.first))]


def _search(tables: Tables, search: Pass, groups: Sequence[Group], *, add: bool) -> tuple[float, Chain | None]:
    """The best value over one pass and its chain."""
    others = _others(groups, search)
    measure = _measure(tables, search, others, add=add)
    counts = _counts(others)
    table = _table(tables, measure, counts)
    levels = counts.digits.sum(axis=1) + 1 + int(measure.close is not None)
    counted = (levels <= tables.max_stages) & ((tables.stages_exactly == 0) | (levels == tables.stages_exactly))
    ends = _ends(measure, table) + np.where(counted, 0.0, INF)[:, None, None]
    state, last, cut = (int(index) for index in np.unravel_index(int(ends.argmin()), ends.shape))
    value = float(ends[state, last, cut])
    if not np.isfinite(value):
        return INF, None
    blocks = search.start.size - 1
    tail = ((search.first, cut, blocks),) if measure.close is not None else ()
    steps = _trace(measure, counts, table, (state, last, cut))
    chain = (*_members(search, others, steps), *tail)
    # Of like devices the hop may fail between the two that are left: no plan then.
    return (value, chain) if len(chain) == len(steps) + len(tail) else (INF, None)


def _table(tables: Tables, measure: _Measure, counts: _Counts) -> Floats:
    """[S, G+1, N+1] best value by used counts, last device's group and blocks done."""
    groups, edges = counts.sizes.size, measure.start.size
    table = np.full((len(counts.digits), groups + 1, edges), INF)
    table[0, 0] = measure.start
    levels = counts.digits.sum(axis=1)
    longest = (tables.stages_exactly or tables.max_stages) - 1 - int(measure.close is not None)
    for level in range(min(int(levels.max()), longest)):
        states = np.flatnonzero(levels == level)
        for group in range(groups):
            ready = states[counts.digits[states, group] < counts.sizes[group]]
            if ready.size:
                table[ready + counts.strides[group], group + 1] = _opened(measure, table[ready], group)
    return table


def _opened(measure: _Measure, rows: Floats, group: int) -> Floats:
    """[n, N+1] after one more shard, on a device of *group*."""
    arrive = np.full((rows.shape[0], rows.shape[2]), INF)
    for last in range(rows.shape[1]):
        np.minimum(arrive, measure.joined(rows[:, last], measure.hop[last, group + 1]), out=arrive)
    reached = np.full_like(arrive, INF)
    for start in range(1, rows.shape[2] - 1):
        longer = measure.joined(arrive[:, start, None], measure.run[group, start, start + 1 :])
        np.minimum(reached[:, start + 1 :], longer, out=reached[:, start + 1 :])
    return reached


def _ends(measure: _Measure, table: Floats) -> Floats:
    """[S, G+1, N+1] value of ending after each state, by the last cut before the end."""
    if measure.close is not None:
        return measure.joined(table, measure.joined(measure.hop[:, 0], measure.close))
    ends = np.full_like(table, INF)
    ends[:, :, -1] = measure.joined(table[:, :, -1], measure.end)
    return ends


def _trace(
    measure: _Measure, counts: _Counts, table: Floats, at: tuple[int, int, int]
) -> tuple[tuple[int, int, int], ...]:
    """Stages as (group + 1, start, stop); 0 is the first device."""
    state, last, stop = at
    steps: list[tuple[int, int, int]] = []
    while last:
        group = last - 1
        state -= int(counts.strides[group])
        hops = measure.joined(table[state], measure.hop[:, last])
        values = measure.joined(hops, measure.run[group, :, stop])
        before, start = (int(index) for index in np.unravel_index(int(values.argmin()), values.shape))
        steps.append((last, start, stop))
        last, stop = before, start
    return (0, 0, stop), *reversed(steps)


def _members(search: Pass, groups: Sequence[Group], steps: Sequence[tuple[int, int, int]]) -> Chain:
    """Of each group the unused device that the one before reaches best; short when one is out of reach."""
    chain = [(search.first, *steps[0][1:])]
    used = {search.first}
    for step, start, stop in steps[1:]:
        here = chain[-1][0]
        free = [d for d in groups[step - 1] if d not in used and np.isfinite(search.hop[here, d, start])]
        if not free:
            break
        device = min(free, key=lambda d: float(search.hop[here, d, start]))
        used.add(device)
        chain.append((device, start, stop))
    return tuple(chain)


def _counts(groups: Sequence[Group]) -> _Counts:
    sizes = np.array([len(group) for group in groups], np.int64)
    strides = np.cumprod([1, *(sizes[:-1] + 1)], dtype=np.int64)[: sizes.size]
    states = np.arange(int(np.prod(sizes + 1)))
    return _Counts(digits=states[:, None] // strides % (sizes + 1), strides=strides, sizes=sizes)


def _measure(tables: Tables, search: Pass, groups: Sequence[Group], *, add: bool) -> _Measure:
    """The pass's own costs, or for the same shards and hops the seconds that they are busy."""
    first, close = search.first, search.close
    start, run, hop, end = search.start, search.run, search.hop, search.end
    if not add:
        start, run = _where(start, tables.run_s[first, 0]), _where(run, tables.run_s)
        hop, end = _where(hop, tables.wire_s), np.where(np.isfinite(end), 0.0, INF)
        if close is not None:
            begun_s = float(start[np.isfinite(start)][0])
            close = _where(close, begun_s + tables.run_s[first, :, -1])
    heads = [group[0] for group in groups]
    return _Measure(
        add=add,
        start=start,
        run=run[heads] if heads else np.zeros((0, *run.shape[1:])),
        hop=_between([(first,), *groups], hop),
        end=end[[first, *heads]],
        close=close,
    )


def _where(allowed: Floats, values: Floats) -> Floats:
    return np.where(np.isfinite(allowed), values, INF)


def _between(groups: Sequence[Group], hop: Floats) -> Floats:
    """[G+1, G+1, N+1] hops from group to group: the median over their pairs of devices that have a link."""
    found = np.full((len(groups), len(groups), hop.shape[2]), INF)
    for i, ones in enumerate(groups):
        for j, others in enumerate(groups):
            pairs = np.array([hop[a, b] for a in ones for b in others if a != b])
            linked = pairs[np.isfinite(pairs).any(axis=1)] if pairs.size else pairs
            if linked.size:
                found[i, j] = np.median(linked, axis=0)
    return found
