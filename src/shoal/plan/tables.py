"""A problem as arrays, so that a solver's inner loop is a few array operations.

Index order is [device, start, stop] for runs of blocks and [from, to, cut] for hops; infinity marks what is not
allowed.  Every number is that of `cost`, weighted for one request (for throughput: for the requests of one micro-batch): once
for each prompt, tokens out - 1 times for a further step.

A search chooses for each hop whether it is direct or goes through a relay, and which (`Pass.via`): the way that costs least by the
search's own measure, among those that its cap admits.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from shoal.ids import NodeId
from shoal.plan.arrays import INF, Flags, Floats, Whole
from shoal.plan.cost import (
    Span,
    barred,
    battery_joules,
    free_bytes,
    may_relay,
    occupied,
    owners,
    prefill_rounds,
    prefill_steps,
    prompts_counted,
)
from shoal.plan.hops import Hops, entry_s, hops_of, return_s
from shoal.plan.problem import DeviceSpec, LinkSpec, Problem
from shoal.plan.ranges import allowed_s, alone_s, laps, need_bytes

Chain = tuple[tuple[int, int, int], ...]
"""Stages as (device index, start, stop)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What a chain costs beside time: the sum of its runs and hops, for one request."""

    run: Floats
    """[M, N+1, N+1]"""
    hop: Floats
    """[M, M, N+1] over direct links"""
    relay: Floats
    """[M] passing on a request's frames"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What a search minimises: a sum of latency, joules and money."""

    latency: float = 1.0
    joules: float = 0.0
    price: float = 0.0


LATENCY = Weights()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """What every solver reads; M devices, N blocks."""

    nodes: tuple[NodeId, ...]
    firsts: tuple[int, ...]
    """Devices that may run block 0."""
    closing: int | None
    """The source, when it may run both the first and the last stage."""
    run_s: Floats
    """[M, N+1, N+1] seconds that a request keeps a shard busy; infinite for empty and forbidden ranges."""
    pass_s: Floats
    """[M, N+1, N+1] what a shard adds to a request's latency; less than `run_s` where a prompt's chunks overlap."""
    need_bytes: Floats
    """[M, N+1, N+1]"""
    free_bytes: Floats
    """[M]"""
    battery_joules: Floats
    """[M] what all shards of a device may draw for one request; infinite where nothing limits it"""
    hop_s: Floats
    """[M, M, N+1] over direct links"""
    wire_s: Floats
    """[M, M, N+1] seconds that a request occupies a direct link"""
    relay_s: Floats
    """[M] what a relay adds to a request's latency, and how long it is busy; infinite where a device may not relay"""
    occupies: tuple[tuple[object, ...], ...]
    """[M, M] what a direct link keeps others from; None where there is no link"""
    joules: Rows
    price: Rows
    entry_s: Floats
    """[M] the prompt's ids from the source."""
    return_s: Floats
    """[M first, M last] tokens back to the first stage and to the source."""
    in_flight: int
    max_stages: int
    stages_exactly: int

    def takes(self, device: int, start: Whole | slice | int, stop: Whole | int) -> Floats:
        """[.., 2] bytes and joules that shards take of a device; what several of them take adds up."""
        return np.stack([self.need_bytes[device, start, stop], self.joules.run[device, start, stop]], axis=-1)

    def has(self, device: int) -> Floats:
        """[2] bytes and joules that all shards of a device may take together."""
        return np.array([self.free_bytes[device], self.battery_joules[device]])

    def both_may(self, first: int, stop: int) -> Flags:
        """[N+1] whether *first* can run blocks up to *stop* and a last shard, by that one's start."""
        taken = self.takes(first, 0, stop) + self.takes(first, slice(None), -1)
        return np.asarray((taken <= self.has(first)).all(axis=-1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One search of a chain: from *first*, by additive costs."""

    first: int
    start: Floats
    """[N+1] cost of the first stage by its stop."""
    run: Floats
    hop: Floats
    via: Whole
    """[M, M, N+1] device that relays a hop; -1: none"""
    end: Floats
    """[M] cost of ending on a device."""
    close: Floats | None
    """[N+1] cost of a last stage on *first*, by its start; None: *first* runs one stage only."""
    sums: Floats | None = None
    """As `run`, whether or not it fits, where a run's cost is an opening and the sum of its blocks; None: it is no such sum."""


def build_tables(problem: Problem) -> Tables:
    """Arrays of a checked problem; devices that may take no block are left out."""
    out = barred(problem)
    devices = [device for device in problem.devices if device.node not in out]
    nodes = tuple(device.node for device in devices)
    owned = owners(problem)
    first, last = owned.get(0), owned.get(len(problem.blocks) - 1)
    prompts = prompts_counted(problem)
    rounds = prompts * prefill_rounds(problem.shape)
    hops = hops_of(problem, devices)
    return Tables(
        nodes=nodes,
        firsts=tuple(range(len(nodes))) if first is None else (nodes.index(first),),
        closing=nodes.index(first) if first is not None and first == last == problem.source else None,
        run_s=allowed_s(problem, devices, owned, prompts * prefill_steps(problem.shape)),
        pass_s=allowed_s(problem, devices, owned, rounds),
        need_bytes=need_bytes(problem, devices),
        free_bytes=np.array([free_bytes(device) for device in devices], dtype=np.float64),
        battery_joules=np.array([battery_joules(device) for device in devices], dtype=np.float64),
        hop_s=hops.hop_s,
        wire_s=hops.wire_s,
        relay_s=np.array(
            [(rounds + laps(problem)) * d.step_overhead_s if may_relay(problem, d) else INF for d in devices]
        ),
        occupies=tuple(tuple(occupied(link) if link else None for link in row) for row in hops.links),
        joules=_rows(problem, devices, hops, (lambda d: d.active_watts, lambda link: link.joules_per_byte)),
        price=_rows(problem, devices, hops, (lambda d: d.price_per_hour / 3600, lambda link: link.price_per_byte)),
        entry_s=entry_s(problem, nodes),
        return_s=return_s(problem, nodes, hops),
        in_flight=problem.shape.in_flight,
        max_stages=problem.max_stages or len(nodes) + 1,
        stages_exactly=problem.stages_exactly,
    )


def spans_of(tables: Tables, chain: Chain, via: Whole) -> tuple[Span, ...]:
    """A solver's chain in the problem's words, with the relays that its search chose."""
    spans = [Span(tables.nodes[device], start, stop) for device, start, stop in chain[:1]]
    for here, there in pairwise(chain):
        relay = int(via[here[0], there[0], here[2]])
        spans += [Span(tables.nodes[relay], here[2], here[2])] if relay >= 0 else []
        spans.append(Span(tables.nodes[there[0]], there[1], there[2]))
    return tuple(spans)


def cost_passes(tables: Tables, cap_s: float = INF, weights: Weights = LATENCY) -> Iterator[Pass]:
    """Searches that minimise a weighted sum; no device or link is kept busy for longer than *cap_s*."""
    fits = (tables.need_bytes <= tables.free_bytes[:, None, None]) & (tables.run_s <= cap_s)
    cost = _weighted(weights, tables.pass_s, tables.joules.run, tables.price.run)
    run = np.where(fits, cost, INF)
    hop, via = _ways(tables, cap_s, weights)
    ends = (_weighted(weights, tables.entry_s), _weighted(weights, tables.return_s))

    def close(first: int, stop: int) -> Floats:
        busy_s = tables.run_s[first, 0, stop] + tables.run_s[first, :, -1]
        return np.where(tables.both_may(first, stop) & (busy_s <= cap_s), cost[first, :, -1], INF)

    for search in passes_of(tables, (run, hop, via), ends, close):
        yield dataclasses.replace(search, sums=cost)


def _ways(tables: Tables, cap_s: float, weights: Weights) -> tuple[Floats, Whole]:
    """The cheapest way of each hop, direct or through one relay, no link of it busy for longer than *cap_s*."""
    cost = _weighted(weights, tables.hop_s, tables.joules.hop, tables.price.hop)
    direct = np.where(tables.wire_s <= cap_s, cost, INF)
    relaying = _weighted(weights, tables.relay_s, tables.joules.relay, tables.price.relay)
    relays = np.flatnonzero(np.isfinite(relaying) & (tables.relay_s <= cap_s))
    if not relays.size:
        return direct, np.broadcast_to(np.int64(-1), direct.shape)
    best, via = direct.copy(), np.full(direct.shape, -1, np.int64)
    for relay in relays:
        both = direct[:, relay, None] + direct[None, relay, :] + relaying[relay]
        both[relay], both[:, relay] = INF, INF
        better = both < best
        better[np.diag_indices(len(tables.nodes))] = False
        best[better], via[better] = both[better], relay
    return best, via


def _weighted(weights: Weights, time_s: Floats, joules: Floats | None = None, price: Floats | None = None) -> Floats:
    """The sum, infinite wherever the time is; a weight of 0 does not make a forbidden thing free."""
    if weights == LATENCY:
        return time_s
    total = np.where(np.isfinite(time_s), 0.0, INF)
    for weight, values in ((weights.latency, time_s), (weights.joules, joules), (weights.price, price)):
        if weight and values is not None:
            total = total + weight * values
    return np.asarray(total)


def missing_passes(tables: Tables) -> Iterator[Pass]:
    """Searches whose cost is the bytes by which the stages overflow their devices."""
    need, free = tables.need_bytes, tables.free_bytes[:, None, None]
    run = np.where(np.isfinite(tables.run_s), np.maximum(need - free, 0), INF)

    def close(first: int, stop: int) -> Floats:
        both = need[first, 0, stop] + need[first, :, -1] - tables.free_bytes[first]
        drawn = tables.joules.run[first, 0, stop] + tables.joules.run[first, :, -1]
        may = np.isfinite(run[first, :, -1]) & (drawn <= tables.battery_joules[first])
        return np.where(may, np.maximum(both, 0) - run[first, 0, stop], INF)

    reach, via = _ways(tables, INF, Weights(latency=0.0))
    return passes_of(tables, (run, reach, via), (_reach(tables.entry_s), _reach(tables.return_s)), close)


def busy_s(tables: Tables, chain: Chain, via: Whole) -> float:
    """Seconds that one request (or micro-batch) keeps the chain's busiest device, link or medium occupied."""
    taken: dict[object, float] = {}

    def take(what: object, seconds: float) -> None:
        taken[what] = taken.get(what, 0.0) + seconds

    for device, start, stop in chain:
        take(device, float(tables.run_s[device, start, stop]))
    for (here, _, cut), (there, _, _) in pairwise(chain):
        relay = int(via[here, there, cut])
        legs = ((here, there),) if relay < 0 else ((here, relay), (relay, there))
        for a, b in legs:
            take(tables.occupies[a][b], float(tables.wire_s[a, b, cut]))
        if relay >= 0:
            take(relay, float(tables.relay_s[relay]))
    return max(taken.values())


def passes_of(
    tables: Tables,
    costs: tuple[Floats, Floats, Whole],
    ends: tuple[Floats, Floats],
    close: Callable[[int, int], Floats],
) -> Iterator[Pass]:
    """Searches by (run, hop, via) and (entry, return) costs; *close*(first, stop) are those of coming back to the source."""
    (run, hop, via), (entry, back) = costs, ends
    for first in tables.firsts:
        start = entry[first] + run[first, 0]
        if first != tables.closing:
            yield Pass(first=first, start=start, run=run, hop=hop, via=via, end=back[first], close=None)
            continue
        yield Pass(first=first, start=_only(start, -1), run=run, hop=hop, via=via, end=back[first], close=None)
        for stop in range(1, start.size - 1):
            if np.isfinite(start[stop]):
                never = np.full(len(tables.nodes), INF)
                last = close(first, stop)
                yield Pass(first=first, start=_only(start, stop), run=run, hop=hop, via=via, end=never, close=last)


def _only(values: Floats, index: int) -> Floats:
    kept = np.full_like(values, INF)
    kept[index] = values[index]
    return kept


def _reach(values: Floats) -> Floats:
    return np.where(np.isfinite(values), 0.0, INF)


Rates = tuple[Callable[[DeviceSpec], float], Callable[[LinkSpec], float]]
"""Per second of a busy device, and per byte on a link."""


def _rows(problem: Problem, devices: list[DeviceSpec], hops: Hops, rates: Rates) -> Rows:
    per_second, per_byte = rates
    rate = np.array([per_second(device) for device in devices])
    ranges = (len(devices), len(problem.blocks) + 1, len(problem.blocks) + 1)
    run = alone_s(problem, devices) * rate[:, None, None] if rate.any() else np.broadcast_to(0.0, ranges)
    relaying = (rate * np.array([device.step_overhead_s for device in devices])) * (
        prefill_steps(problem.shape) + laps(problem) / problem.shape.batch
    )
    sent = np.array([[per_byte(link) if link else 0.0 for link in row] for row in hops.links])
    charged = sent[:, :, None] * hops.sent if sent.any() else np.broadcast_to(0.0, (*sent.shape, hops.sent.size))
    return Rows(run=run, hop=charged, relay=relaying)
