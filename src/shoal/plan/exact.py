"""Every placement there is, one by one: the judge of the solvers in tests.  Exponential; for a handful of blocks and
devices.

It shares only the cost model with them: no tables, no bounds.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations, permutations

from shoal.errors import InfeasibleError
from shoal.ids import NodeId
from shoal.plan.cost import Priced, Span, free_bytes, objective_value, price, shard_memory
from shoal.plan.problem import Problem


def enumerate_best(problem: Problem) -> Priced | None:
    """The best placement that satisfies the constraints, or None when there is none."""
    priced = [_priced(problem, spans) for spans in placements(problem) if satisfies(problem, spans)]
    possible = [item for item in priced if item is not None]
    return min(possible, key=lambda item: objective_value(problem.objective, item.estimate), default=None)


def placements(problem: Problem) -> Iterator[tuple[Span, ...]]:
    """All chains: every order of devices (the source may come back last), every choice of cuts."""
    nodes = [device.node for device in problem.devices]
    blocks = len(problem.blocks)
    for stages in range(1, min(blocks, len(nodes) + 1) + 1):
        for order in _orders(nodes, stages, problem.source):
            for cuts in combinations(range(1, blocks), stages - 1):
                edges = (0, *cuts, blocks)
                yield tuple(Span(node, edges[i], edges[i + 1]) for i, node in enumerate(order))


def satisfies(problem: Problem, spans: Sequence[Span]) -> bool:
    """Do pins, stage counts, exclusions and memory allow it?  (Links are priced.)"""
    homes = {block: span.node for span in spans for block in range(span.start, span.stop)}
    last = len(problem.blocks) - 1
    count_ok = len(spans) <= (problem.max_stages or len(spans)) and problem.stages_exactly in {0, len(spans)}
    pins_ok = all(homes[pin.block] == pin.node for pin in problem.pins)
    ends_ok = (not problem.pin_first or homes[0] == problem.source) and (
        not problem.pin_last or homes[last] == problem.source
    )
    repeated = len({span.node for span in spans}) < len(spans)
    both_pinned = {_owner(problem, 0), _owner(problem, last)} == {problem.source}
    excluded = any(span.node in problem.exclude for span in spans)
    return count_ok and pins_ok and ends_ok and not excluded and (not repeated or both_pinned) and fits(problem, spans)


def fits(problem: Problem, spans: Sequence[Span]) -> bool:
    """Does each device hold its shards?"""
    devices = {device.node: device for device in problem.devices}
    need: dict[NodeId, int] = {}
    for span in spans:
        need[span.node] = (
            need.get(span.node, 0) + shard_memory(problem, devices[span.node], span.start, span.stop).total
        )
    return all(size <= free_bytes(devices[node]) for node, size in need.items())


def _orders(nodes: Sequence[NodeId], stages: int, source: NodeId) -> Iterator[tuple[NodeId, ...]]:
    yield from permutations(nodes, stages)
    if stages > 2 and source in nodes:
        others = [node for node in nodes if node != source]
        yield from ((source, *middle, source) for middle in permutations(others, stages - 2))


def _owner(problem: Problem, block: int) -> NodeId | None:
    if (block == 0 and problem.pin_first) or (block == len(problem.blocks) - 1 and problem.pin_last):
        return problem.source
    return next((pin.node for pin in problem.pins if pin.block == block), None)


def _priced(problem: Problem, spans: Sequence[Span]) -> Priced | None:
    try:
        return price(problem, spans)
    except InfeasibleError:
        return None
