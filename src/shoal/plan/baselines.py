"""What others would answer: named rules and searches on the same cost model and constraints, for comparisons.

Each is a function of a checked problem and gives a placement that satisfies every constraint, or None where it finds none.
They start from the same tables as the solvers, so that memory, pins, residency and batteries are the same for all.  Where a
rule only names an order and shares (even split, by memory, by speed), the nearest feasible cuts to them are taken
(`shoal.plan.shares`), the same repair for each; where a search keeps memory itself, nothing is repaired, and its dead ends stay.
No baseline relays through a node without blocks: none of their authors does.

Every one is given its best case: the source first where the first block belongs there, times weighted by the request as in
`shoal.plan.cost` where the paper averages prefill and decode, exact memory, and for ties the better chain.
"""

import dataclasses
import heapq
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from math import prod
from types import MappingProxyType
from typing import Protocol

import numpy as np
from msgspec.structs import replace

from shoal.errors import InfeasibleError
from shoal.plan.arrays import INF, Floats
from shoal.plan.bottleneck import WORK_LIMIT, Group, least_bottleneck
from shoal.plan.cost import Span, Wires, barred, meets, objective_value, owners, price, wires_of
from shoal.plan.exact import allowed
from shoal.plan.layerwise import layer_by_layer
from shoal.plan.problem import DeviceSpec, Objective, Problem
from shoal.plan.shares import nearest
from shoal.plan.tables import Chain, Pass, Tables, Weights, build_tables, cost_passes

Spans = tuple[Span, ...]


class Baseline(Protocol):
    """A rule or search; *ready* are the tables that it would build for itself, without relays."""

    def __call__(self, problem: Problem, ready: Tables | None = None) -> Spans | None:
        """A plan that keeps every constraint, or None."""
        ...


PAIRS_PRICED = 256
"""Two-device chains that `best_pair` prices at most; the first of them is the best one but where chunks overlap."""


def worth(problem: Problem, spans: Sequence[Span], wires: Wires | None = None) -> float:
    """The objective's value; infinite where a constraint is broken or a link is missing.  *wires* as in `price`."""
    if not spans or not allowed(problem, spans):
        return INF
    try:
        estimate = price(problem, spans, wires).estimate
    except InfeasibleError:
        return INF
    return objective_value(problem.objective, estimate) if meets(problem.limits, estimate) else INF


def edgeshard_latency(problem: Problem, ready: Tables | None = None) -> Spans | None:
    """EdgeShard's latency search (arXiv 2405.14371, section IV), the path carrying its memory along: its best reading.

    Phases are weighted by the request, where the paper takes the mean of prefill and decode.  Run twice, with and without the
    paper's freedom to come back to a device; the better that keeps the constraints counts.
    """
    tables = ready or _tables(problem)
    if tables is None:
        return None
    devices = len(tables.nodes)
    home = np.arange(devices) == (-1 if tables.closing is None else tables.closing)
    chains = [layer_by_layer(tables, _weights(problem), again) for again in (home, np.ones(devices, bool))]
    return _best(problem, [_spans(tables, chain) for chain in chains if chain])


def edgeshard_throughput(problem: Problem, ready: Tables | None = None) -> Spans | None:
    """EdgeShard's throughput search (arXiv 2405.14371, section IV): least busiest stage or transfer, over sets of devices.

    The lap is not looked at, but for ties.  None beyond some 15 devices: its table doubles with each.
    """
    return _balanced(problem, ready, lambda tables: [(device,) for device in range(len(tables.nodes))])


def pipeedge(problem: Problem, ready: Tables | None = None) -> Spans | None:
    """PipeEdge's scheduler (Hu et al., DSD 2022): least busiest stage or transfer, over counts of devices of each class.

    Like devices are those that differ in their name and links only; a hop between classes counts as its median link, and of a
    class the device with the best link is taken.
    """

    def classes(tables: Tables) -> list[Group]:
        devices = {device.node: device for device in problem.devices}
        alike: defaultdict[object, list[int]] = defaultdict(list)
        for index, node in enumerate(tables.nodes):
            alike[_figures(devices[node])].append(index)
        return [tuple(group) for group in alike.values()]

    return _balanced(problem, ready, classes)


def memory_ring(problem: Problem, ready: Tables | None = None) -> Spans | None:
    """The ring of exo (ring_memory_weighted_partitioning_strategy.py): most memory first, blocks in proportion to it."""

    def shares(tables: Tables, order: list[int]) -> list[int]:
        free = tables.free_bytes[order]
        edges = np.cumsum([0.0, *free]) / max(float(free.sum()), 1.0)
        return [int(n) for n in np.diff(np.round(edges * len(problem.blocks)).astype(int))]

    return _shared_out((problem, ready), lambda tables: -tables.free_bytes, shares)


def speed_greedy(problem: Problem, ready: Tables | None = None) -> Spans | None:
    """The fastest device first, each filled before the next is opened; a source that must come first takes its turn by speed."""

    def shares(tables: Tables, order: list[int]) -> list[int]:
        held = _most_blocks(tables)
        pinned = order[0] if len(tables.firsts) == 1 else -1
        left, wanted = len(problem.blocks) - int(pinned >= 0), dict.fromkeys(order, 0)
        speed = _speed(problem, tables)
        for device in sorted(order, key=lambda d: speed[d]):
            wanted[device] = min(left, int(held[device]) - int(device == pinned))
            left -= wanted[device]
        return [wanted[device] + int(device == pinned) for device in order]

    return _shared_out((problem, ready), lambda tables: _speed(problem, tables), shares)


def even_split(problem: Problem, ready: Tables | None = None) -> Spans | None:
    """All devices in the problem's order, as many blocks on each (the usual default of pipeline runners)."""

    def shares(_: Tables, order: list[int]) -> list[int]:
        each, more = divmod(len(problem.blocks), len(order))
        return [each + int(place < more) for place in range(len(order))]

    return _shared_out((problem, ready), lambda tables: np.arange(len(tables.nodes), dtype=np.float64), shares)


def best_single(problem: Problem, ready: Tables | None = None) -> Spans | None:
    """The whole model on the one device that is best for it."""
    tables = ready or _tables(problem)
    if tables is None:
        return None
    return _best(problem, [(Span(tables.nodes[first], 0, len(problem.blocks)),) for first in tables.firsts])


def best_pair(problem: Problem, ready: Tables | None = None) -> Spans | None:
    """The best cut over the best two devices; where the last block stays on the source, there and back.

    All of them are ranked by a bound of their value and priced in that order, until the bound passes the best.
    """
    tables = ready or _tables(problem)
    if tables is None:
        return None
    best: tuple[float, Spans | None] = (INF, None)
    wires = wires_of(problem)
    for bound, chain in _ranked(problem, tables):
        if bound >= best[0]:
            break
        spans = _spans(tables, chain)
        best = min(best, (worth(problem, spans, wires), spans), key=lambda found: found[0])
    return best[1] if best[0] < INF else None


BASELINES: Mapping[str, Baseline] = MappingProxyType(
    {
        "edgeshard_latency": edgeshard_latency,
        "edgeshard_throughput": edgeshard_throughput,
        "pipeedge": pipeedge,
        "memory_ring": memory_ring,
        "speed_greedy": speed_greedy,
        "even_split": even_split,
        "best_single": best_single,
        "best_pair": best_pair,
    }
)


def baseline_plans(problem: Problem, tables: Tables) -> dict[str, Spans]:
    """The plan of each baseline that has one; *tables* are the problem's."""
    ready = dataclasses.replace(tables, relay_s=np.full_like(tables.relay_s, INF))
    return {name: spans for name, baseline in BASELINES.items() if (spans := baseline(problem, ready))}


def best_baseline(problem: Problem, tables: Tables) -> tuple[str, Spans] | None:
    """The best plan of all baselines and its author's name; *tables* are the problem's."""
    wires = wires_of(problem)
    valued = [(worth(problem, spans, wires), name, spans) for name, spans in baseline_plans(problem, tables).items()]
    value, name, best = min(valued, key=lambda one: one[0], default=(INF, "", ()))
    return (name, best) if value < INF else None


def _tables(problem: Problem) -> Tables | None:
    """Tables without relays; None where a device that must take part may not, or none may."""
    out = barred(problem)
    wanted = {*owners(problem).values(), *problem.require}
    if wanted & out.keys() or all(device.node in out for device in problem.devices):
        return None
    tables = build_tables(problem)
    return dataclasses.replace(tables, relay_s=np.full_like(tables.relay_s, INF))


def _weights(problem: Problem) -> Weights:
    match problem.objective:
        case Objective.ENERGY:
            return Weights(latency=0.0, joules=1.0)
        case Objective.PRICE:
            return Weights(latency=0.0, price=1.0)
        case Objective.LATENCY | Objective.THROUGHPUT:
            return Weights()


def _balanced(problem: Problem, ready: Tables | None, groups: Callable[[Tables], list[Group]]) -> Spans | None:
    """Searched as a throughput problem whatever the objective: that is what these searches are for."""
    if ready is not None and prod(len(group) + 1 for group in groups(ready)) > WORK_LIMIT:
        return None  # tables of their own are not worth building
    same = ready is not None and problem.objective is Objective.THROUGHPUT
    tables = ready if same else _tables(replace(problem, objective=Objective.THROUGHPUT))
    chain = least_bottleneck(tables, groups(tables)) if tables else None
    return _best(problem, [_spans(tables, chain)]) if tables and chain else None


def _figures(device: DeviceSpec) -> object:
    return replace(device, node=device.node[:0])


def _shared_out(
    asked: tuple[Problem, Tables | None],
    rank: Callable[[Tables], Floats],
    shares: Callable[[Tables, list[int]], list[int]],
) -> Spans | None:
    """Devices by *rank*, the one that must come first in front; the feasible cuts nearest to the *shares*."""
    problem, ready = asked
    tables = ready or _tables(problem)
    if tables is None:
        return None
    ranks = rank(tables)
    order = sorted(range(len(tables.nodes)), key=lambda device: (ranks[device], device))
    most = (tables.stages_exactly or tables.max_stages) - int(tables.closing is not None)
    found: list[tuple[float, Chain]] = []
    for search in cost_passes(tables):
        if len(tables.firsts) > 1 and search.first != order[0]:
            continue
        line = [search.first, *(device for device in order if device != search.first)][: max(1, most)]
        chain = nearest(search, line, shares(tables, line))
        found += [chain] if chain else []
    ordered = sorted(found, key=lambda near: near[0])
    return next((s for _, chain in ordered if worth(problem, s := _spans(tables, chain)) < INF), None)


def _most_blocks(tables: Tables) -> Floats:
    """[M] the longest run of blocks that fits somewhere on each device."""
    edges = np.arange(tables.need_bytes.shape[1])
    length = edges[None, :] - edges[:, None]
    fits = tables.need_bytes <= tables.free_bytes[:, None, None]
    return np.asarray(np.where(fits, length, 0).max(axis=(1, 2)))


def _speed(problem: Problem, tables: Tables) -> Floats:
    """[M] seconds of a request with every block on one device."""
    devices = {device.node: device for device in problem.devices}
    laps = problem.shape.tokens_out - 1
    return np.array([sum(devices[n].prefill_s) + laps * sum(devices[n].decode_s) for n in tables.nodes])


def _ranked(problem: Problem, tables: Tables) -> Iterator[tuple[float, Chain]]:
    """The most promising chains over two devices, with bounds of their values, best first."""
    order = count()
    found: list[tuple[float, int, Chain]] = []
    for search in cost_passes(tables, weights=_weights(problem)):
        bounds = _pair_bounds(problem, tables, search)
        flat = bounds.ravel()
        picks = np.argpartition(flat, min(PAIRS_PRICED, flat.size - 1))[:PAIRS_PRICED]
        for pick in picks[np.isfinite(flat[picks])]:
            other, cut = divmod(int(pick), bounds.shape[1])
            found.append((float(flat[pick]), next(order), _pair(search, other, cut)))
    for bound, _, chain in heapq.nsmallest(PAIRS_PRICED, found):
        yield bound, chain


def _pair_bounds(problem: Problem, tables: Tables, search: Pass) -> Floats:
    """[M, N+1] never above the value of the two-device chain by its second device and cut."""
    first, stop = search.first, _stop(search)
    if search.close is None:
        total = (search.start + search.hop[first]) + search.run[:, :, -1] + search.end[:, None]
        busy_s = np.maximum(np.maximum(tables.run_s[first, 0], tables.wire_s[first]), tables.run_s[:, :, -1])
    else:
        there = search.start[stop] + search.hop[first, :, stop][:, None] + search.run[:, stop, :]
        total = there + search.hop[:, first] + search.close
        busy_s = np.maximum(tables.run_s[first, 0, stop] + tables.run_s[first, :, -1], tables.run_s[:, stop, :])
    total[first] = INF
    if problem.objective is not Objective.THROUGHPUT:
        return np.asarray(total)
    period_s = np.where(np.isfinite(total), np.maximum(busy_s, total / tables.in_flight), INF)
    return np.asarray(period_s / (problem.shape.batch * problem.shape.tokens_out))


def _pair(search: Pass, other: int, cut: int) -> Chain:
    blocks = search.start.size - 1
    if search.close is None:
        return (search.first, 0, cut), (other, cut, blocks)
    return (search.first, 0, _stop(search)), (other, _stop(search), cut), (search.first, cut, blocks)


def _stop(search: Pass) -> int:
    """Where the first shard of a pass that comes back ends."""
    return int(np.flatnonzero(np.isfinite(search.start))[0]) if search.close is not None else -1


def _spans(tables: Tables, chain: Chain) -> Spans:
    return tuple(Span(tables.nodes[device], start, stop) for device, start, stop in chain)


def _best(problem: Problem, candidates: Sequence[Spans]) -> Spans | None:
    """The best that keeps every constraint, or None."""
    wires = wires_of(problem)
    valued = [(worth(problem, spans, wires), spans) for spans in candidates]
    value, spans = min(valued, key=lambda found: found[0], default=(INF, ()))
    return spans if value < INF else None
