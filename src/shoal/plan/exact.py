"""Every placement there is, one by one: the judge of the solvers in tests.  Exponential; for a handful of blocks and
devices.

It shares only the cost model with them: no tables, no bounds.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise, permutations, product

from shoal.errors import InfeasibleError
from shoal.ids import NodeId
from shoal.plan.cost import (
    Priced,
    Span,
    barred,
    battery_joules,
    free_bytes,
    meets,
    objective_value,
    owners,
    price,
    shard_joules,
    shard_memory,
)
from shoal.plan.problem import Limits, Problem


def enumerate_best(problem: Problem) -> Priced | None:
    """The best placement that satisfies the constraints, or None when there is none."""
    priced = [_priced(problem, spans) for spans in placements(problem) if satisfies(problem, spans)]
    possible = [item for item in priced if item is not None]
    return min(possible, key=lambda item: objective_value(problem.objective, item.estimate), default=None)


def placements(problem: Problem) -> Iterator[tuple[Span, ...]]:
    """All chains: every order of devices (the source may come back last), every choice of cuts and of relays."""
    nodes = [device.node for device in problem.devices]
    blocks = len(problem.blocks)
    for stages in range(1, min(blocks, len(nodes) + 1) + 1):
        for order in _orders(nodes, stages, problem.source):
            for cuts in combinations(range(1, blocks), stages - 1):
                edges = (0, *cuts, blocks)
                spans = tuple(Span(node, edges[i], edges[i + 1]) for i, node in enumerate(order))
                yield from _relayed(problem, spans) if problem.relay else (spans,)


def satisfies(problem: Problem, spans: Sequence[Span]) -> bool:
    """Do pins, stage counts, exclusions, memory, batteries and limits allow it?  (Links are priced.)"""
    return allowed(problem, spans) and _within_limits(problem, spans)


def allowed(problem: Problem, spans: Sequence[Span]) -> bool:
    """The same whatever its figures are: limits are not looked at."""
    shards = [span for span in spans if span.start < span.stop]
    homes = {block: span.node for span in shards for block in range(span.start, span.stop)}
    owned, out = owners(problem), barred(problem)
    count_ok = len(shards) <= (problem.max_stages or len(shards)) and problem.stages_exactly in {0, len(shards)}
    pins_ok = all(homes[block] == node for block, node in owned.items())
    there = {span.node for span in shards}
    both_pinned = {owned.get(0), owned.get(len(problem.blocks) - 1)} == {problem.source}
    repeats_ok = len(there) == len(shards) or both_pinned
    devices_ok = not any(span.node in out for span in spans) and all(node in there for node in problem.require)
    demands_ok = count_ok and pins_ok and devices_ok and repeats_ok
    return demands_ok and fits(problem, spans) and _within_battery(problem, spans)


def fits(problem: Problem, spans: Sequence[Span]) -> bool:
    """Does each device hold its shards?"""
    devices = {device.node: device for device in problem.devices}
    shards: defaultdict[NodeId, int] = defaultdict(int)
    relays: dict[NodeId, int] = {}
    for span in spans:
        size = shard_memory(problem, devices[span.node], span.start, span.stop).total
        if span.start < span.stop:
            shards[span.node] += size
        else:
            relays[span.node] = size
    # A shard leaves room for a relay's process, and one process serves all hops: alone it takes no more than that.
    need = {node: max(shards[node], relays.get(node, 0)) for node in shards.keys() | relays.keys()}
    return all(size <= free_bytes(devices[node]) for node, size in need.items())


def _orders(nodes: Sequence[NodeId], stages: int, source: NodeId) -> Iterator[tuple[NodeId, ...]]:
    yield from permutations(nodes, stages)
    if stages > 2 and source in nodes:
        others = [node for node in nodes if node != source]
        yield from ((source, *middle, source) for middle in permutations(others, stages - 2))


def _relayed(problem: Problem, spans: tuple[Span, ...]) -> Iterator[tuple[Span, ...]]:
    """The chain with each hop direct or through any third node."""
    nodes = [device.node for device in problem.devices]
    ways = [[None, *(node for node in nodes if node not in {here.node, there.node})] for here, there in pairwise(spans)]
    for relays in product(*ways):
        chain = [spans[0]]
        for relay, span in zip(relays, spans[1:], strict=True):
            chain += [Span(relay, span.start, span.start)] if relay is not None else []
            chain.append(span)
        yield tuple(chain)


def _within_battery(problem: Problem, spans: Sequence[Span]) -> bool:
    """Do the shards of each device draw no more than it may give to one request?"""
    devices = {device.node: device for device in problem.devices}
    drawn: defaultdict[NodeId, float] = defaultdict(float)
    for span in spans:
        if span.start < span.stop:
            drawn[span.node] += shard_joules(problem, devices[span.node], span)
    return all(joules <= battery_joules(devices[node]) for node, joules in drawn.items())


def _within_limits(problem: Problem, spans: Sequence[Span]) -> bool:
    """Do the figures keep to the limits?  A chain without links has none."""
    if problem.limits == Limits():
        return True
    priced = _priced(problem, spans)
    return priced is None or meets(problem.limits, priced.estimate)


def _priced(problem: Problem, spans: Sequence[Span]) -> Priced | None:
    try:
        return price(problem, spans)
    except InfeasibleError:
        return None
