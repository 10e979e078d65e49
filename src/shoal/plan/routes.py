"""How requests are spread over shards that are placed: the most that all ways together give, and what each step of a way gets.

A way is a chain of placed shards that line up; where pipelines are cut at the same block, a request may go on in another one.
This is the greatest flow through a layered graph, as Helix spreads requests, with two things that a flow does not know: what
shards of one device or frames of one medium share, and the closed loop, by which a shard that holds the cache of so many
sequences is passed by no more of them at once.  Ways are few, so it is a linear programme over ways: its solution gives the
weights, its prices what binds.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import msgspec
import numpy as np

from shoal.errors import InfeasibleError
from shoal.ids import NodeId
from shoal.plan.cost import (
    ROUNDING,
    Priced,
    Span,
    busy_times,
    free_bytes,
    meets,
    price,
    shard_memory,
)
from shoal.plan.packing import pack
from shoal.plan.problem import Limits, LinkSpec, Problem

MOST_WAYS = 400
WORTH = 1e-6
"""Relative; a request changes pipelines only for more than this."""

Way = tuple[Span, ...]
"""A chain of shards and the relays between them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Micro-batches per second by way, and the resources that nothing is left of."""

    ways: tuple[Way, ...]
    rates: tuple[float, ...]
    binding: tuple[object, ...]

    @property
    def rate(self) -> float:
        """Of all ways together."""
        return sum(self.rates)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costed:
    """What a micro-batch takes on a way."""

    priced: Priced
    busy_s: Mapping[object, float]
    lap_s: float
    """All its prompts and further steps, one after another."""


def spread(problem: Problem, pipelines: Sequence[Way]) -> Spread:
    """Rates over the *pipelines* alone, or over all ways through their shards where that gives more."""
    alone = _spread(problem, pipelines, pipelines)
    ways = [*pipelines, *crossing(problem, pipelines)]
    if len(ways) == len(pipelines):
        return alone
    together = _spread(problem, pipelines, ways)
    return together if together.rate > alone.rate * (1 + WORTH) else alone


def costed(problem: Problem, way: Way) -> Costed | None:
    """Figures of a way alone; None where it has no link or breaks a limit on a request."""
    try:
        priced = price(problem, way)
    except InfeasibleError:
        return None
    limits = msgspec.structs.replace(problem.limits, tokens_per_s=None)
    if limits != Limits() and not meets(limits, priced.estimate):
        return None
    shape, estimate = problem.shape, priced.estimate
    wires: dict[tuple[NodeId, NodeId], LinkSpec] = {(link.source, link.target): link for link in problem.links}
    laps = shape.tokens_out - 1
    return Costed(
        priced=priced,
        busy_s=busy_times(problem, wires, priced.stages, (shape.batch, laps)),
        lap_s=shape.batch * estimate.time_to_first_token_s + laps * estimate.time_per_output_token_s,
    )


def shards(way: Way) -> tuple[Span, ...]:
    """Its stages that hold blocks."""
    return tuple(span for span in way if span.start < span.stop)


def fits_together(problem: Problem, pipelines: Sequence[Way]) -> bool:
    """Does each device hold its shards, a shard that several pipelines use with the cache of each?"""
    uses: dict[Span, int] = {}
    for way in pipelines:
        for span in shards(way):
            uses[span] = uses.get(span, 0) + 1
    devices = {device.node: device for device in problem.devices}
    need = dict.fromkeys(devices, 0)
    for span, count in uses.items():
        slots, shared = problem.shape.slots, problem.shape.cache_tokens
        shape = msgspec.structs.replace(problem.shape, slots=count * slots, cache_tokens=count * shared)
        held = msgspec.structs.replace(problem, shape=shape)
        need[span.node] += shard_memory(held, devices[span.node], span.start, span.stop).total
    return all(size_bytes <= free_bytes(devices[node]) for node, size_bytes in need.items())


def crossing(problem: Problem, pipelines: Sequence[Way]) -> Iterator[Way]:
    """Ways through placed shards that are no pipeline's own, relays at their own hops only; none where there are too many."""
    known = dict.fromkeys(pipelines)
    placed = list(dict.fromkeys(span for way in pipelines for span in shards(way)))
    relayed = {
        (a, c): b for way in pipelines for a, b, c in zip(way, way[1:], way[2:], strict=False) if b.start == b.stop
    }
    linked = {(link.source, link.target) for link in problem.links}
    blocks, found = len(problem.blocks), list[Way]()
    waiting: list[Way] = [(span,) for span in placed if span.start == 0]
    while waiting:
        way = waiting.pop()
        if way[-1].stop == blocks:
            found += [way] if way not in known else []
        if len(found) + len(waiting) > MOST_WAYS:
            return
        used = {span.node for span in shards(way)}
        for there in placed:
            returns = there.node == way[0].node == problem.source and there.stop == blocks and len(used) > 1
            if there.start != way[-1].stop or (there.node in used and not returns):
                continue
            if (relay := relayed.get((way[-1], there))) is not None:
                waiting.append((*way, relay, there))
            elif (way[-1].node, there.node) in linked:
                waiting.append((*way, there))
    yield from (way for way in found if _counted(problem, way))


def _counted(problem: Problem, way: Way) -> bool:
    count = len(shards(way))
    return count <= (problem.max_stages or count) and problem.stages_exactly in {0, count}


def _spread(problem: Problem, pipelines: Sequence[Way], ways: Sequence[Way]) -> Spread:
    known = [(way, cost) for way in ways if (cost := costed(problem, way)) is not None]
    held: dict[Span, int] = {}
    for way in pipelines:
        for span in shards(way):
            held[span] = held.get(span, 0) + problem.shape.in_flight
    keys = list(dict.fromkeys(key for _, cost in known for key, busy_s in cost.busy_s.items() if busy_s > 0))
    used = [key for key in held if any(key in way for way, _ in known)]
    rows = np.array(
        [
            *([cost.busy_s.get(key, 0.0) for _, cost in known] for key in keys),
            *([cost.lap_s * (span in way) for way, cost in known] for span in used),
        ]
    ).reshape(len(keys) + len(used), len(known))
    limits = np.array([*(1.0 for _ in keys), *(float(held[span]) for span in used)])
    if not (rows > 0).any(axis=0).all():  # takes no time at all: there is no most of it
        return Spread(ways=tuple(ways[:1]), rates=(float("inf"),), binding=())
    packed = pack(rows, limits)
    binding = tuple(key for key, worth in zip([*keys, *used], packed.prices, strict=True) if worth > ROUNDING)
    return Spread(ways=tuple(way for way, _ in known), rates=tuple(packed.amounts.tolist()), binding=binding)


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """One step of requests from a shard to the next."""

    source: Span
    target: Span
    requests_per_s: float
    weight: float
    """Of the requests at the first of the two shards, how many go on to the second."""


def routes(problem: Problem, found: Spread) -> tuple[Route, ...]:
    """Steps that requests take, each with its share of what leaves a shard."""
    flows: dict[tuple[Span, Span], float] = {}
    for way, rate in zip(found.ways, found.rates, strict=True):
        for here, there in pairwise(shards(way)):
            flows[here, there] = flows.get((here, there), 0.0) + rate * problem.shape.batch
    leaving: dict[Span, float] = {}
    for (here, _), amount in flows.items():
        leaving[here] = leaving.get(here, 0.0) + amount
    return tuple(
        Route(
            source=here,
            target=there,
            requests_per_s=amount,
            weight=amount / leaving[here],
        )
        for (here, there), amount in flows.items()
        if amount > 0
    )
