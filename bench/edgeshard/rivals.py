"""The paper's methods, on our cost model: each a function of a problem that gives a chain, or None where it does not fit.

Each is given its best case.  Times are those of a decode step: the profile has prompts cost as much, and the paper takes their
mean.  A seam: these are what `shoal.plan.baselines` will offer under the same names.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shoal.errors import InfeasibleError
from shoal.ids import NodeId
from shoal.plan.cost import Span, cut_bytes, decode_times, free_bytes, objective_value, price, shard_memory
from shoal.plan.exact import satisfies
from shoal.plan.problem import Problem

Floats = npt.NDArray[np.float64]
Spans = tuple[Span, ...]
Walk = tuple[float, tuple[int, ...], tuple[int, ...]]
"""Seconds, the device of each block, and the bytes that each device holds then."""
INF = float("inf")
ROUNDING = 1e-9
"""Equal runs of equal blocks differ in their last digits."""


def best_single(problem: Problem) -> Spans | None:
    """The whole model on one device."""
    chains = [(Span(device.node, 0, len(problem.blocks)),) for device in problem.devices]
    return _cheapest(problem, chains)


def best_pair(problem: Problem) -> Spans | None:
    """The best cut over two devices, the source first."""
    blocks, others = len(problem.blocks), [d.node for d in problem.devices if d.node != problem.source]
    cuts = itertools.product(others, range(1, blocks))
    return _cheapest(problem, [(Span(problem.source, 0, cut), Span(node, cut, blocks)) for node, cut in cuts])


def even_split(problem: Problem) -> Spans | None:
    """As many blocks on each device, in the problem's order."""
    blocks, count = len(problem.blocks), len(problem.devices)
    edges = [blocks * place // count for place in range(count + 1)]
    pairs = itertools.pairwise(edges)
    return _cheapest(problem, [tuple(Span(d.node, *pair) for d, pair in zip(problem.devices, pairs, strict=True))])


def edgeshard_latency(problem: Problem) -> Spans | None:
    """DP(i, j) of arXiv 2405.14371, section IV, the path carrying along what it holds on each device (its best reading).

    With and without the paper's freedom to come back to a device; the better counts.
    """
    return _cheapest(problem, [chain for again in (False, True) if (chain := _layer_by_layer(problem, again=again))])


def edgeshard_throughput(problem: Problem) -> Spans | None:
    """The least busiest stage or transfer (section IV), over sets of devices; of equally good chains that of the least lap."""
    table = _Table(problem)
    values = np.unique(np.concatenate([table.run[np.isfinite(table.run)], table.wire[np.isfinite(table.wire)]]))
    low, high = 0, len(values) - 1
    if not table.possible(values[high]):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if table.possible(values[middle]) else (middle + 1, high)
    return _cheapest(problem, [table.least_lap(values[low] * (1 + ROUNDING))])


def worth(problem: Problem, chain: Spans | None) -> float:
    """What the objective makes of a chain; infinite where there is none, or it breaks a constraint."""
    if not chain or not satisfies(problem, chain):
        return INF
    try:
        return objective_value(problem.objective, price(problem, chain).estimate)
    except InfeasibleError:
        return INF


def _cheapest(problem: Problem, chains: Sequence[Spans]) -> Spans | None:
    best = min(chains, key=lambda chain: worth(problem, chain), default=())
    return best if worth(problem, best) < INF else None


def _wire_s(problem: Problem, nodes: Sequence[NodeId]) -> Floats:
    """[k, j] seconds of one step's rows; every cut of these models is alike."""
    wires = {(link.source, link.target): link for link in problem.links}
    _, row_bytes = cut_bytes(problem, 1)
    found = np.full((len(nodes), len(nodes)), INF)
    for (k, a), (j, b) in itertools.permutations(enumerate(nodes), 2):
        if (a, b) in wires:
            found[k, j] = wires[a, b].latency_s + row_bytes / wires[a, b].bytes_per_s
    return found


def _layer_by_layer(problem: Problem, *, again: bool) -> Spans | None:
    nodes = [device.node for device in problem.devices]
    wire = _wire_s(problem, nodes)
    times = [decode_times(device, problem.shape.batch) for device in problem.devices]
    need = [[shard_memory(problem, d, i, i + 1).total for i in range(len(problem.blocks))] for d in problem.devices]
    free = [free_bytes(device) for device in problem.devices]
    start = nodes.index(problem.source)
    held = tuple(need[start][0] if j == start else 0 for j in range(len(nodes)))
    paths: dict[int, Walk] = {start: (times[start][0], (start,), held)}
    for block in range(1, len(problem.blocks)):
        grown: dict[int, Walk] = {}
        for j in range(len(nodes)):
            for k, (cost, path, held) in paths.items():
                if held[j] + need[j][block] > free[j] or (not again and j != k and j in path):
                    continue
                total = cost + times[j][block] + (0.0 if j == k else wire[k, j])
                if total < grown.get(j, (INF,))[0]:
                    grown[j] = total, (*path, j), (*held[:j], held[j] + need[j][block], *held[j + 1 :])
        paths = grown
    if not paths:
        return None
    _, path, _ = min(paths.values())
    groups = [(device, len(list(run))) for device, run in itertools.groupby(path)]
    stops = list(itertools.accumulate(length for _, length in groups))
    return tuple(Span(nodes[d], stop - n, stop) for (d, n), stop in zip(groups, stops, strict=True))


class _Table:
    """Runs and wires of a problem, and the two searches over sets of devices."""

    def __init__(self, problem: Problem) -> None:
        self.nodes = [device.node for device in problem.devices]
        self.count, self.blocks = len(self.nodes), len(problem.blocks)
        self.first = self.nodes.index(problem.source)
        self.wire = _wire_s(problem, self.nodes)
        self.run = np.full((self.count, self.blocks + 1, self.blocks + 1), INF)
        for j, device in enumerate(problem.devices):
            times = np.concatenate([[0.0], np.cumsum(decode_times(device, problem.shape.batch))])
            for start, stop in itertools.combinations(range(self.blocks + 1), 2):
                if shard_memory(problem, device, start, stop).total <= free_bytes(device):
                    self.run[j, start, stop] = times[stop] - times[start]
        masks = np.arange(1 << self.count)
        sizes = np.array([int(mask).bit_count() for mask in masks])
        self.levels = [masks[(sizes == size) & (masks >> self.first & 1 == 1)] for size in range(1, self.count)]

    def possible(self, cap_s: float) -> bool:
        """Is there a chain without a stage or transfer above *cap_s*?  By the longest prefix of each set and last device."""
        stops = np.arange(self.blocks + 1)
        reach = np.where(self.run <= cap_s, stops, stops[:, None]).max(axis=2)
        longest = np.full((1 << self.count, self.count), -1, np.int16)
        longest[1 << self.first, self.first] = reach[self.first, 0] or -1
        for masks in self.levels:
            for j in range(self.count):
                without = masks[masks >> j & 1 == 0]
                known = np.where(self.wire[:, j] <= cap_s, longest[without], -1).max(axis=1)
                longest[without | 1 << j, j] = np.where(known >= 0, reach[j, known], -1)
        return bool(longest.max() == self.blocks)

    def least_lap(self, cap_s: float) -> Spans:
        """The chain of least compute and transfers under the cap."""
        run = np.where(self.run <= cap_s, self.run, INF)
        wire = np.where(self.wire <= cap_s, self.wire, INF)
        lap = np.full((1 << self.count, self.count, self.blocks + 1), INF, np.float32)
        lap[1 << self.first, self.first] = run[self.first, 0]
        for masks in self.levels:
            for j in range(self.count):
                without = masks[masks >> j & 1 == 0]
                there = (lap[without] + wire[:, j, None]).min(axis=1)
                grown = np.full_like(there, INF)
                for start, stop in zip(*np.nonzero(np.isfinite(run[j])), strict=True):
                    np.minimum(grown[:, stop], there[:, start] + run[j, start, stop], out=grown[:, stop])
                lap[without | 1 << j, j] = grown
        return self._back(lap, run, wire)

    def _back(self, lap: npt.NDArray[np.float32], run: Floats, wire: Floats) -> Spans:
        mask, j = (int(part) for part in np.unravel_index(np.argmin(lap[:, :, -1]), lap.shape[:2]))
        stop, spans = self.blocks, list[Span]()
        while mask != 1 << self.first:
            before = (lap[mask & ~(1 << j)] + wire[:, j, None]) + run[j, :, stop]
            k, start = (int(part) for part in np.unravel_index(np.argmin(before), before.shape))
            spans.append(Span(self.nodes[j], start, stop))
            mask, j, stop = mask & ~(1 << j), k, start
        return (Span(self.nodes[j], 0, stop), *reversed(spans))
