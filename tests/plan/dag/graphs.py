"""Random small graphs, and every placement there is, priced step by step without the planner's own cost model."""

import random
from collections.abc import Iterator
from itertools import product

from hypothesis import strategies as st

from shoal.ids import NodeId
from shoal.plan.dag.problem import GraphProblem, OpPin, OpSpec, SharedWeights, TensorSpec, TierLink, TierSpec

NODES = tuple(NodeId(name) for name in ("board", "gateway", "server"))
Labels = tuple[int, ...]


def graph_problems(
    tiers: int | st.SearchStrategy[int] = 2, *, short: bool = False, pinned: bool = False, most: int = 8
) -> st.SearchStrategy[GraphProblem]:
    """Few operators whose tensors have several readers; with *short* memory binds, *pinned* adds pins of either end.

    Operators and tiers together are *most* at most.  Each is drawn from a seed: hundreds of them in seconds.
    """
    lines = st.just(tiers) if isinstance(tiers, int) else tiers
    return st.builds(
        lambda seed, count: graph_problem(random.Random(seed), count, most - count, short=short, pinned=pinned),
        st.integers(0, 2**32),
        lines,
    )


def graph_problem(rng: random.Random, tiers: int, largest: int, *, short: bool, pinned: bool) -> GraphProblem:
    """One of them."""
    count = rng.randint(2, largest)
    names = rng.sample(range(count), count)
    weights = [rng.randint(0, 9) for _ in names]
    return GraphProblem(
        ops=tuple(
            OpSpec(name=f"op {i}", weights_bytes=weights[i], workspace_bytes=rng.choice((0, 0, 3)) * short)
            for i in range(count)
        ),
        tensors=(_inputs(rng, count), *(_tensor(rng, names, place) for place in range(count))),
        tiers=tuple(_tier(rng, k, count, sum(weights) if short else 10**6) for k in range(tiers)),
        links=tuple(_links(rng, tiers)),
        pin_inputs=rng.random() < 0.5,
        pins=tuple(_pins(rng, names, tiers)) if pinned else (),
        shared=tuple(_shared(rng, weights)) if short else (),
    )


def _inputs(rng: random.Random, count: int) -> TensorSpec:
    readers = rng.sample(range(count), rng.randint(1, 2))
    return TensorSpec(name="in", size_bytes=rng.randint(0, 12), consumers=tuple(sorted(readers)))


def _tensor(rng: random.Random, names: list[int], place: int) -> TensorSpec:
    """Of the operator at *place* of a hidden order; those near to it may read it."""
    later = names[place + 1 : place + 5]
    readers = rng.sample(later, min(len(later), rng.randint(0, 3)))
    return TensorSpec(
        name=f"tensor {place}",
        size_bytes=rng.randint(0, 12),
        producer=names[place],
        consumers=tuple(sorted(readers)),
        returned=not readers or rng.random() < 0.1,
    )


def _tier(rng: random.Random, k: int, count: int, weights_bytes: int) -> TierSpec:
    slowness = rng.choice((1, 2, 4)) if k else 6
    return TierSpec(
        node=NODES[k],
        op_s=tuple(float(slowness * rng.randint(0, 6)) for _ in range(count)),
        memory_budget_bytes=2 + weights_bytes * rng.choice((20, 50, 70, 100)) // 100,
        memory_promised_bytes=1,
        fixed_bytes=rng.randint(0, 1),
        weights_factor=rng.choice((1.0, 1.1)),
        step_overhead_s=float(rng.randint(0, 2)),
    )


def _links(rng: random.Random, tiers: int) -> Iterator[TierLink]:
    for k in range(tiers - 1):
        for a, b in ((k, k + 1), (k + 1, k)):
            if rng.random() < 0.95:
                yield TierLink(
                    source=NODES[a],
                    target=NODES[b],
                    latency_s=float(rng.randint(0, 3)),
                    bytes_per_s=rng.choice((0.5, 1.0, 2.0, 8.0)),
                )


def _pins(rng: random.Random, names: list[int], tiers: int) -> Iterator[OpPin]:
    """The first operator of the hidden order on the source, the last one anywhere."""
    if rng.random() < 0.5:
        yield OpPin(op=names[0], node=NODES[0])
    if rng.random() < 0.5:
        yield OpPin(op=names[-1], node=NODES[rng.randrange(tiers)])


def _shared(rng: random.Random, weights: list[int]) -> Iterator[SharedWeights]:
    users = [op for op, size in enumerate(weights) if size >= 4][:3]
    if len(users) > 1 and rng.random() < 0.5:
        yield SharedWeights(size_bytes=min(weights[op] for op in users), ops=tuple(users))


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
