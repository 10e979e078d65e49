"""The same question cut between blocks only: a chain, which the chain planner answers.

Where one tensor alone leads from what is before to what is after, operators on both sides are blocks of a chain
(articulations); a model's own frontiers may be given instead.  The chain's problem has the same price as the graph's:
links between tiers that are not neighbours cost what the way through the line costs, an empty first block on the source
stands for the inputs, so that all of the model may be elsewhere, and the way back is a link to the source that takes as
long as all answers take.  Where answers are made early that is more than they take; the price of the graph decides.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from shoal.ids import NodeId
from shoal.plan.budget import Budget
from shoal.plan.check import LARGEST, SLOWEST_BYTES_PER_S
from shoal.plan.dag.check import owners
from shoal.plan.dag.cost import INF, Facts, Labels, latency_s, overflow_bytes, stored_bytes
from shoal.plan.dag.problem import SharedWeights
from shoal.plan.placement import place
from shoal.plan.problem import BlockSpec, DeviceSpec, LinkSpec, Pin, Plan, Problem, RequestShape, SharedTensor

MOST_CUTS = 1000
"""A chain planner's tables grow with the square of it."""


def articulations(known: Facts) -> tuple[int, ...]:
    """Positions in the operators' order that a single tensor crosses, the narrowest where there are very many."""
    widths = _widths(known)
    single = sorted((size, at) for at, (count, size) in enumerate(widths) if count <= 1 and 0 < at < len(known.order))
    return tuple(sorted(at for _, at in single[:MOST_CUTS]))


def best_chain(known: Facts, cuts: Sequence[int], budget: Budget) -> Labels | None:
    """The best tiers with cuts at the given positions only; None when there are none."""
    chain = chain_problem(known, cuts)
    answer = place(chain, budget) if chain else None
    if not isinstance(answer, Plan):
        return None
    groups, tiers = _groups(known, cuts), {tier.node: k for k, tier in enumerate(known.problem.tiers)}
    labels = [0] * len(known.order)
    for stage in answer.stages:
        for block in range(max(1, stage.start), stage.stop):
            for op in groups[block - 1]:
                labels[op] = tiers[stage.node]
    found = tuple(labels)
    return found if latency_s(known, found) < INF and not sum(overflow_bytes(known, found)) else None


def chain_problem(known: Facts, cuts: Sequence[int]) -> Problem | None:
    """The question as a chain of blocks between *cuts*; None when operators of one block belong on different tiers."""
    groups = _groups(known, cuts)
    pins = _pins(known, groups)
    if pins is None:
        return None
    return Problem(
        blocks=tuple(_blocks(known, groups, cuts)),
        devices=tuple(_device(known, groups, k) for k in range(len(known.op_s))),
        links=tuple(_links(known)),
        shape=RequestShape(tokens_in=1, tokens_out=1, context_tokens=0, slots=1, prefill_chunk_tokens=1),
        source=known.problem.tiers[0].node,
        pins=pins,
        shared=tuple(_shared(known.problem.shared, groups)),
    )


def _groups(known: Facts, cuts: Sequence[int]) -> list[tuple[int, ...]]:
    ends = [0, *cuts, len(known.order)]
    return [known.order[start:stop] for start, stop in pairwise(ends)]


def _pins(known: Facts, groups: Sequence[Sequence[int]]) -> tuple[Pin, ...] | None:
    owner = dict(owners(known.problem))
    found: list[Pin] = []
    for block, ops in enumerate(groups, 1):
        nodes = {owner[op] for op in ops if op in owner}
        if len(nodes) > 1:
            return None
        found += [Pin(block=block, node=node) for node in nodes]
    return tuple(found)


def _blocks(known: Facts, groups: Sequence[Sequence[int]], cuts: Sequence[int]) -> Iterator[BlockSpec]:
    widths, ops = _widths(known), known.problem.ops
    yield BlockSpec(name="inputs", weights_bytes=0, output_bytes_fixed=widths[0][1])
    for group, stop in zip(groups, [*cuts, len(known.order)], strict=True):
        first, last = ops[group[0]].name, ops[group[-1]].name
        yield BlockSpec(
            name=first if len(group) == 1 else f"{first} to {last}",
            weights_bytes=stored_bytes(known.problem, group),
            output_bytes_fixed=widths[stop][1],
            workspace_bytes=max(ops[op].workspace_bytes for op in group),
        )


def _device(known: Facts, groups: Sequence[Sequence[int]], k: int) -> DeviceSpec:
    tier = known.problem.tiers[k]
    seconds = (0.0, *(sum(tier.op_s[op] for op in group) for group in groups))
    return DeviceSpec(
        node=tier.node,
        memory_budget_bytes=tier.memory_budget_bytes,
        memory_promised_bytes=tier.memory_promised_bytes,
        fixed_bytes=tier.fixed_bytes,
        weights_factor=tier.weights_factor,
        step_overhead_s=tier.step_overhead_s,
        decode_s=seconds,
        prefill_s=seconds,
    )


def _links(known: Facts) -> Iterator[LinkSpec]:
    """From each tier to all beyond, through those between; and from each that answers can come back from to the source."""
    tiers = known.problem.tiers
    joined = {(link.source, link.target) for link in known.problem.links}
    onward = _unbroken([(a.node, b.node) in joined for a, b in pairwise(tiers)])
    back = _unbroken([(b.node, a.node) in joined for a, b in pairwise(tiers)])
    for here in range(onward + 1):
        for there in range(here + 1, onward + 1):
            between = range(here + 1, there + 1)
            latency = sum(known.enter_s[k] for k in between) - tiers[there].step_overhead_s
            yield _link(tiers[here].node, tiers[there].node, latency, sum(known.byte_s[k] for k in between))
    sizes = sum(size for _, size in known.answers)
    for k in range(1, (back if known.answers else onward) + 1):
        way = range(1, k + 1)
        answers_s = sum(known.back_s[j] + known.back_byte_s[j] * sizes for j in way) if known.answers else 0.0
        yield _link(tiers[k].node, tiers[0].node, answers_s, 0.0)


def _unbroken(joined: Sequence[bool]) -> int:
    return joined.index(False) if False in joined else len(joined)


def _link(source: NodeId, target: NodeId, latency_s: float, byte_s: float) -> LinkSpec:
    rate = min(LARGEST, max(SLOWEST_BYTES_PER_S, 1 / byte_s)) if byte_s else LARGEST
    return LinkSpec(source=source, target=target, latency_s=max(0.0, latency_s), bytes_per_s=rate)


def _shared(shared: Sequence[SharedWeights], groups: Sequence[Sequence[int]]) -> Iterator[SharedTensor]:
    for weights in shared:
        held = set(weights.ops)
        blocks = tuple(block for block, ops in enumerate(groups, 1) if held.intersection(ops))
        if len(blocks) > 1:
            yield SharedTensor(size_bytes=weights.size_bytes, blocks=blocks)


def _widths(known: Facts) -> list[tuple[int, int]]:
    """Tensors that cross each position of the order, 0 and its end included, and their bytes."""
    rank = {op: at for at, op in enumerate(known.order)}
    steps = [[0, 0] for _ in range(len(known.order) + 2)]
    for wire in known.wires:
        born = 0 if wire.producer is None else rank[wire.producer] + 1
        dies = max(rank[consumer] for consumer in wire.consumers) + 1
        for at, sign in ((born, 1), (dies, -1)):
            steps[at][0] += sign
            steps[at][1] += sign * wire.size_bytes
    found, count, size = [], 0, 0
    for more, wider in steps:
        count, size = count + more, size + wider
        found.append((count, size))
    return found[:-1]
