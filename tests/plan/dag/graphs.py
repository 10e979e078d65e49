"""Random small graphs, and every placement there is, priced step by step without the planner's own cost model."""

from collections.abc import Iterator
from itertools import product

from hypothesis import strategies as st

from shoal.ids import NodeId
from shoal.plan.dag.problem import GraphProblem, OpPin, OpSpec, SharedWeights, TensorSpec, TierLink, TierSpec

NODES = tuple(NodeId(name) for name in ("board", "gateway", "server"))
Labels = tuple[int, ...]


@st.composite
def graph_problems(
    draw: st.DrawFn, tiers: int = 2, *, short: bool = False, pinned: bool = False, largest: int = 7
) -> GraphProblem:
    """Few operators whose tensors have several readers; with *short* memory binds, *pinned* adds pins of either end."""
    count = draw(st.integers(2, largest))
    names = draw(st.permutations(range(count)))
    weights = draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    return GraphProblem(
        ops=tuple(
            OpSpec(name=f"op {i}", weights_bytes=weights[i], workspace_bytes=draw(st.sampled_from((0, 0, 3))) * short)
            for i in range(count)
        ),
        tensors=(_inputs(draw, count), *(_tensor(draw, names, place) for place in range(count))),
        tiers=tuple(_tier(draw, k, count, sum(weights) if short else 10**6) for k in range(tiers)),
        links=tuple(_links(draw, tiers)),
        pin_inputs=draw(st.booleans()),
        pins=tuple(_pins(draw, names, tiers)) if pinned else (),
        shared=tuple(_shared(draw, weights)) if short else (),
    )


def _inputs(draw: st.DrawFn, count: int) -> TensorSpec:
    readers = draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=2))
    return TensorSpec(name="in", size_bytes=draw(st.integers(0, 12)), consumers=tuple(sorted(readers)))


def _tensor(draw: st.DrawFn, names: list[int], place: int) -> TensorSpec:
    """Of the operator at *place* of a hidden order; those near to it may read it."""
    later = names[place + 1 : place + 5]
    readers = draw(st.sets(st.sampled_from(later), max_size=3)) if later else set()
    return TensorSpec(
        name=f"tensor {place}",
        size_bytes=draw(st.integers(0, 12)),
        producer=names[place],
        consumers=tuple(sorted(readers)),
        returned=not readers or draw(st.integers(0, 9)) == 0,
    )


def _tier(draw: st.DrawFn, k: int, count: int, weights_bytes: int) -> TierSpec:
    slowness = draw(st.sampled_from((1, 2, 4))) if k else 6
    part = draw(st.sampled_from((20, 50, 70, 100)))
    return TierSpec(
        node=NODES[k],
        op_s=tuple(float(slowness * draw(st.integers(0, 6))) for _ in range(count)),
        memory_budget_bytes=2 + weights_bytes * part // 100,
        memory_promised_bytes=1,
        fixed_bytes=draw(st.integers(0, 1)),
        weights_factor=draw(st.sampled_from((1.0, 1.1))),
        step_overhead_s=float(draw(st.integers(0, 2))),
    )


def _links(draw: st.DrawFn, tiers: int) -> Iterator[TierLink]:
    for k in range(tiers - 1):
        for a, b in ((k, k + 1), (k + 1, k)):
            if draw(st.integers(0, 19)):
                yield TierLink(
                    source=NODES[a],
                    target=NODES[b],
                    latency_s=float(draw(st.integers(0, 3))),
                    bytes_per_s=draw(st.sampled_from((0.5, 1.0, 2.0, 8.0))),
                )


def _pins(draw: st.DrawFn, names: list[int], tiers: int) -> Iterator[OpPin]:
    """The first operator of the hidden order on the source, the last one anywhere."""
    if draw(st.booleans()):
        yield OpPin(op=names[0], node=NODES[0])
    if draw(st.booleans()):
        yield OpPin(op=names[-1], node=NODES[draw(st.integers(0, tiers - 1))])


def _shared(draw: st.DrawFn, weights: list[int]) -> Iterator[SharedWeights]:
    users = [op for op, size in enumerate(weights) if size >= 4]
    if len(users) > 1 and draw(st.booleans()):
        yield SharedWeights(size_bytes=4, ops=tuple(users[:3]))


def placements(problem: GraphProblem) -> dict[Labels, float]:
    """All tiers of all operators that break no rule, and the seconds of one request."""
    found = {}
    for labels in product(range(len(problem.tiers)), repeat=len(problem.ops)):
        seconds = request_s(problem, labels) if _may_be(problem, labels) and fits(problem, labels) else None
        if seconds is not None:
            found[labels] = seconds
    return found


def _may_be(problem: GraphProblem, labels: Labels) -> bool:
    nodes = [problem.tiers[k].node for k in labels]
    if any(nodes[pin.op] != pin.node for pin in problem.pins):
        return False
    for tensor in problem.tensors:
        if tensor.producer is None and problem.pin_inputs and any(labels[op] for op in tensor.consumers):
            return False
        if tensor.producer is not None and any(labels[op] < labels[tensor.producer] for op in tensor.consumers):
            return False
    return True


def fits(problem: GraphProblem, labels: Labels) -> bool:
    """Whether every tier that runs something, and the source, has the memory."""
    for k, tier in enumerate(problem.tiers):
        ops = {op for op, at in enumerate(labels) if at == k}
        if k and not ops:
            continue
        stored = sum(problem.ops[op].weights_bytes for op in ops)
        for shared in problem.shared:
            stored -= shared.size_bytes * max(0, len(ops & set(shared.ops)) - 1)
        packed = -int(-(tier.weights_factor * stored) // 1)
        workspace = max((problem.ops[op].workspace_bytes for op in ops), default=0)
        if tier.fixed_bytes + packed + workspace > tier.memory_budget_bytes - tier.memory_promised_bytes:
            return False
    return True


def request_s(problem: GraphProblem, labels: Labels) -> float | None:
    """Go through the line tier by tier, then bring the answers back; None where a link is missing."""
    links = {(link.source, link.target): link for link in problem.links}
    seconds = 0.0
    for k in range(max(labels) + 1):
        tier = problem.tiers[k]
        seconds += tier.step_overhead_s + sum(tier.op_s[op] for op, at in enumerate(labels) if at == k)
        if k == max(labels):
            break
        link = links.get((tier.node, problem.tiers[k + 1].node))
        if link is None:
            return None
        there = {op for op, at in enumerate(labels) if at > k}
        frame = sum(
            tensor.size_bytes
            for tensor in problem.tensors
            if tensor.producer not in there and there.intersection(tensor.consumers)
        )
        seconds += link.latency_s + frame / link.bytes_per_s
    for k in range(max(labels), 0, -1):
        answers = [
            t.size_bytes for t in problem.tensors if t.returned and t.producer is not None and labels[t.producer] >= k
        ]
        link = links.get((problem.tiers[k].node, problem.tiers[k - 1].node))
        if answers and link is None:
            return None
        if answers and link:
            seconds += link.latency_s + sum(answers) / link.bytes_per_s
    return seconds
