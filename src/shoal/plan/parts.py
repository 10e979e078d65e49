"""Every figure of a chain from four sums: one chunk's way through the stages, one further step's, joules and money.

`cost.price` says what a finished chain gives; a search over several figures at once needs what each stage and hop adds to
each of them.  A *form* weighs the four sums into one additive cost, so that one search serves any mixture of figures:

    time to first token  >=  rounds x through + constants        (equal unless chunks of a prompt overlap)
    latency               =  time to first token + laps x (lap + token home)
    period               >=  (batch x time to first token + laps x lap) / in flight, and >= whatever is busiest

What is busiest is no sum: `Uses` has the seconds that each resource (device, link, medium) is taken, apart from the forms.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from shoal.ids import NodeId
from shoal.plan.arrays import INF, Floats, Whole
from shoal.plan.cost import (
    TOKEN_BYTES,
    TOKEN_FRAME_BYTES,
    cut_bytes,
    decode_times,
    may_relay,
    prefill_rounds,
    prefill_steps,
)
from shoal.plan.problem import DeviceSpec, Estimate, LinkSpec, Objective, Problem
from shoal.plan.tables import Pass, Tables, passes_of


class Measure(StrEnum):
    """A figure to be kept small, by its name in `Limits` and `Estimate`; for tokens per second it is the period."""

    LATENCY = "latency_s"
    FIRST_TOKEN = "time_to_first_token_s"  # noqa: S105 a figure's name
    PERIOD = "tokens_per_s"
    JOULES = "joules"
    PRICE = "price"


MEASURE_OF = {
    Objective.LATENCY: Measure.LATENCY,
    Objective.THROUGHPUT: Measure.PERIOD,
    Objective.ENERGY: Measure.JOULES,
    Objective.PRICE: Measure.PRICE,
}
Form = tuple[float, float, float, float]
"""Weights of through, lap, joules and money."""
UNITS: tuple[Form, ...] = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A problem's sums by block, link and cut; M devices, N blocks, index order as in `Tables`."""

    problem: Problem
    tables: Tables
    block: Floats
    """[M, N, 4]"""
    overhead: Floats
    """[M, 4] of a stage, and of a relay"""
    relays: tuple[int, ...]
    """Devices that frames may pass through."""
    delay_s: Floats
    """[M, M] latency of direct links; infinite where there is none"""
    per_byte_s: Floats
    """[M, M]; 0 where there is no link"""
    charges: Floats
    """[M, M, 2] joules and money per byte"""
    sent: Floats
    """[N+1, 3] bytes over a cut: of a chunk, of a step, of a request"""
    home_s: Floats
    """[M first, M last] the token back to the first stage"""
    deliver_s: Floats
    """[M] the first token to the source"""
    entry_s: Floats
    """[M] the prompt's ids"""
    allowed: Floats
    """[M, N+1, N+1] 0 where a shard may be and fits, infinite elsewhere"""
    chunks: int
    laps: int
    rounds: float

    def run(self, form: Form, cap_s: float = INF) -> Floats:
        """[M, N+1, N+1] cost of shards, none busy for longer than *cap_s*."""
        cost = _ranges(self.block @ np.array(form), self.overhead @ np.array(form)) + self.allowed
        return cost if cap_s == INF else np.where(self.busy(1) <= cap_s, cost, INF)

    def busy(self, phase: int) -> Floats:
        """[M, N+1, N+1] seconds that a shard takes its device: for a prompt (phase 0), for all of a micro-batch (1)."""
        form = np.array(self.use_forms[phase])
        return _ranges(self.block @ form, self.overhead @ form)

    def wire(self, phase: int) -> Floats:
        """[M, M, N+1] seconds that a link is taken."""
        through, lap = self.use_forms[phase][:2]
        return np.asarray(self.per_byte_s[:, :, None] * (through * self.sent[:, 0] + lap * self.sent[:, 1]))

    @property
    def use_forms(self) -> tuple[Form, Form]:
        """What a prompt, and a micro-batch with all its steps, are made of."""
        batch = self.problem.shape.batch
        return (float(self.chunks), 0.0, 0.0, 0.0), (float(batch * self.chunks), float(self.laps), 0.0, 0.0)

    def hop(self, form: Form, cap_s: float = INF) -> Floats:
        """[M, M, N+1] cost of direct hops."""
        through, lap = form[0] * self.sent[:, 0] + form[1] * self.sent[:, 1], form[0] + form[1]
        charge = self.charges @ np.array(form[2:])
        cost = self.per_byte_s[:, :, None] * through + charge[:, :, None] * self.sent[:, 2]
        cost = (
            cost + (np.where(np.isfinite(self.delay_s), lap * np.nan_to_num(self.delay_s, posinf=0.0), INF))[:, :, None]
        )
        return cost if cap_s == INF else np.where(self.wire(1) <= cap_s, cost, INF)

    def relayed(self, direct: Floats, form: Form, relay: int) -> Floats:
        """[M, M, N+1] cost of hops through *relay*."""
        both = direct[:, relay, None] + direct[None, relay, :] + float(self.overhead[relay] @ np.array(form))
        both[relay], both[:, relay] = INF, INF
        return np.asarray(both)

    def form(self, measure: Measure) -> Form:
        """The additive part of a measure: never above it."""
        shape = self.problem.shape
        match measure:
            case Measure.FIRST_TOKEN:
                return (self.rounds, 0.0, 0.0, 0.0)
            case Measure.LATENCY:
                return (self.rounds, float(self.laps), 0.0, 0.0)
            case Measure.PERIOD:
                return (shape.batch * self.rounds / shape.in_flight, self.laps / shape.in_flight, 0.0, 0.0)
            case Measure.JOULES:
                return UNITS[2]
            case Measure.PRICE:
                return UNITS[3]

    def ends(self, measure: Measure, first: int) -> Floats:
        """[M last] what a chain from *first* adds to a measure beside its stages and hops."""
        entry_s, shape = float(self.entry_s[first]), self.problem.shape
        reach = np.where(np.isfinite(self.home_s[first] + self.deliver_s + entry_s), 0.0, INF)
        home_s = np.where(np.isfinite(reach), self.home_s[first], 0.0)
        first_s = np.where(np.isfinite(reach), entry_s + (self.rounds - 1) * home_s + self.deliver_s, 0.0)
        match measure:
            case Measure.FIRST_TOKEN:
                return np.asarray(reach + first_s)
            case Measure.LATENCY:
                return np.asarray(reach + first_s + self.laps * home_s)
            case Measure.PERIOD:
                return np.asarray(reach + (shape.batch * first_s + self.laps * home_s) / shape.in_flight)
            case Measure.JOULES | Measure.PRICE:
                return reach


def build_parts(problem: Problem, tables: Tables) -> Parts:
    """The sums of a checked problem."""
    by_node = {device.node: device for device in problem.devices}
    devices = [by_node[node] for node in tables.nodes]
    wires = {(link.source, link.target): link for link in problem.links}
    links = [[wires.get((a.node, b.node)) for b in devices] for a in devices]
    shape, chunks = problem.shape, prefill_steps(problem.shape)
    fits = np.isfinite(tables.run_s) & (tables.need_bytes <= tables.free_bytes[:, None, None])
    return Parts(
        problem=problem,
        tables=tables,
        block=np.stack([_block(problem, device) for device in devices]),
        overhead=np.stack([_overhead(problem, device) for device in devices]),
        relays=tuple(i for i, device in enumerate(devices) if may_relay(problem, device)),
        delay_s=_of(links, lambda link: link.latency_s, INF),
        per_byte_s=_of(links, lambda link: 1 / link.bytes_per_s, 0.0),
        charges=np.stack(
            [_of(links, lambda k: k.joules_per_byte, 0.0), _of(links, lambda k: k.price_per_byte, 0.0)], axis=2
        ),
        sent=_sent(problem, chunks),
        home_s=_tokens_s(links, TOKEN_FRAME_BYTES).T,
        deliver_s=_to_source_s(problem, devices, wires, TOKEN_FRAME_BYTES, inward=False),
        entry_s=_to_source_s(problem, devices, wires, TOKEN_FRAME_BYTES + TOKEN_BYTES * shape.tokens_in, inward=True),
        allowed=np.where(fits, 0.0, INF),
        chunks=chunks,
        laps=shape.tokens_out - 1,
        rounds=prefill_rounds(shape),
    )


def mixture_passes(parts: Parts, mixture: Mapping[Measure, float], cap_s: float = INF) -> Iterator[Pass]:
    """Searches for the least weighted sum of measures; nothing is busy for longer than *cap_s* of a period."""
    form = mixed(parts, mixture)
    run, (hop, via) = parts.run(form, cap_s), _ways(parts, form, cap_s)
    firsts = range(len(parts.tables.nodes))
    ends = np.stack([mixed_ends(parts, mixture, first) for first in firsts])
    busy_s, tables = parts.busy(1), parts.tables

    def close(first: int, stop: int) -> Floats:
        fits = tables.both_may(first, stop) & (busy_s[first, 0, stop] + busy_s[first, :, -1] <= cap_s)
        # A chain's end is charged where its last shard opens: nothing is left to pay after it.
        return np.where(fits, run[first, :, -1] + ends[first, first], INF)

    return passes_of(tables, (run, hop, via), (np.zeros(len(firsts)), ends), close)


def mixed(parts: Parts, mixture: Mapping[Measure, float]) -> Form:
    """The form of a weighted sum of measures."""
    total = sum(weight * np.array(parts.form(measure)) for measure, weight in mixture.items())
    through, lap, joules, money = (float(value) for value in np.broadcast_to(total, 4))
    return through, lap, joules, money


def mixed_ends(parts: Parts, mixture: Mapping[Measure, float], first: int) -> Floats:
    """[M last] of a weighted sum of measures."""
    total = parts.ends(Measure.PRICE, first)
    for measure, weight in mixture.items():
        total = total + (weight * np.nan_to_num(parts.ends(measure, first), posinf=0.0) if weight else 0.0)
    return np.asarray(total)


def values_of(problem: Problem, estimate: Estimate) -> dict[Measure, float]:
    """All measures of a priced chain."""
    tokens = problem.shape.batch * problem.shape.tokens_out
    values = {measure: float(getattr(estimate, measure)) for measure in Measure}
    values[Measure.PERIOD] = tokens / estimate.tokens_per_s if estimate.tokens_per_s else 0.0
    return values


def bounds_of(problem: Problem) -> dict[Measure, float]:
    """The problem's limits as upper bounds of measures."""
    found = {m: float(limit) for m in Measure if (limit := getattr(problem.limits, m)) is not None}
    if Measure.PERIOD in found:
        tokens = problem.shape.batch * problem.shape.tokens_out
        found[Measure.PERIOD] = tokens / found[Measure.PERIOD] if found[Measure.PERIOD] else INF
    return found


def _ways(parts: Parts, form: Form, cap_s: float) -> tuple[Floats, Whole]:
    """The cheapest way of each hop, direct or through one relay, and which."""
    direct = parts.hop(form, cap_s)
    best, via = direct.copy(), np.full(direct.shape, -1, np.int64)
    relay_s = parts.overhead @ np.array(parts.use_forms[1])
    for relay in parts.relays:
        if relay_s[relay] > cap_s:
            continue
        both = parts.relayed(direct, form, relay)
        better = both < best
        better[np.diag_indices(len(parts.tables.nodes))] = False
        best[better], via[better] = both[better], relay
    return best, via


def _ranges(block: Floats, overhead: Floats) -> Floats:
    """[M, N+1, N+1] sums of each range of blocks, with a stage's overhead."""
    total = np.concatenate([np.zeros((block.shape[0], 1)), np.cumsum(block, axis=1)], axis=1)
    return np.asarray(total[:, None, :] - total[:, :, None] + overhead[:, None, None])


def _block(problem: Problem, device: DeviceSpec) -> Floats:
    """[N, 4]"""
    steps, shape = prefill_steps(problem.shape), problem.shape
    prompt_s, step_s = np.array(device.prefill_s), np.array(decode_times(device, shape.batch))
    busy_s = prompt_s + (shape.tokens_out - 1) / shape.batch * step_s
    money = device.price_per_hour / 3600
    return np.stack([prompt_s / steps, step_s, device.active_watts * busy_s, money * busy_s], axis=1)


def _overhead(problem: Problem, device: DeviceSpec) -> Floats:
    busy_s = device.step_overhead_s * (
        prefill_steps(problem.shape) + (problem.shape.tokens_out - 1) / problem.shape.batch
    )
    money = device.price_per_hour / 3600
    return np.array([device.step_overhead_s, device.step_overhead_s, device.active_watts * busy_s, money * busy_s])


def _of(links: list[list[LinkSpec | None]], value: Callable[[LinkSpec], float], absent: float) -> Floats:
    return np.array([[absent if link is None else value(link) for link in row] for row in links], dtype=np.float64)


def _sent(problem: Problem, chunks: int) -> Floats:
    shape = problem.shape
    share = (shape.tokens_out - 1) / shape.batch
    sizes = [cut_bytes(problem, stop) for stop in range(1, len(problem.blocks))]
    rows = [(prompt / chunks, row, prompt + share * row) for prompt, row in sizes]
    return np.array([(0.0, 0.0, 0.0), *rows, (0.0, 0.0, 0.0)])


def _tokens_s(links: list[list[LinkSpec | None]], payload_bytes: int) -> Floats:
    """[M from, M to]; nothing within a device."""
    time_s = _of(links, lambda link: link.latency_s + payload_bytes / link.bytes_per_s, INF)
    np.fill_diagonal(time_s, 0.0)
    return time_s


def _to_source_s(
    problem: Problem,
    devices: list[DeviceSpec],
    wires: dict[tuple[NodeId, NodeId], LinkSpec],
    payload_bytes: int,
    *,
    inward: bool,
) -> Floats:
    source = problem.source
    pairs = [(source, device.node) if inward else (device.node, source) for device in devices]
    links = [wires.get(pair) for pair in pairs]
    return np.array(
        [
            0.0 if a == b else INF if link is None else link.latency_s + payload_bytes / link.bytes_per_s
            for (a, b), link in zip(pairs, links, strict=True)
        ]
    )
