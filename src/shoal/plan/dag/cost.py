"""What operators on tiers take in seconds and bytes: the one price of a cut, for solvers, plans and tests alike.

`Facts` holds a problem's figures in the form that all of them read.  A tier is its index in the line; `labels[op]` is
the tier of an operator.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from shoal.plan.dag.check import order, owners
from shoal.plan.dag.problem import GraphProblem, Part

INF = float("inf")
Labels = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """A tensor and who reads it; `producer` is None for an input."""

    size_bytes: int
    producer: int | None
    consumers: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Figures by tier (of a link: of the tier it leads to, or comes back from) and operator."""

    problem: GraphProblem
    order: tuple[int, ...]
    op_s: tuple[tuple[float, ...], ...]
    """[tier][op]; infinite where an operator may not be: pins, memory of its own, no link."""
    enter_s: tuple[float, ...]
    """Overhead of each tier, and of the link to it."""
    byte_s: tuple[float, ...]
    """Per byte, to each tier."""
    back_s: tuple[float, ...]
    """Latency of the way back from each tier to the one before."""
    back_byte_s: tuple[float, ...]
    wires: tuple[Wire, ...]
    """Tensors that somebody reads."""
    answers: tuple[tuple[int, int], ...]
    """Producer and bytes of what returns to the source; inputs are there already."""
    free_bytes: tuple[int, ...]
    """For weights and workspace."""


def facts(problem: GraphProblem) -> Facts:
    """Of a checked problem."""
    reach = _reach(problem)
    links = {(link.source, link.target): link for link in problem.links}
    nodes = [tier.node for tier in problem.tiers]
    onward = [None, *(links.get((before, here)) for before, here in pairwise(nodes))]
    back = [None, *(links.get((here, before)) for before, here in pairwise(nodes))]
    free = tuple(tier.memory_budget_bytes - tier.memory_promised_bytes - tier.fixed_bytes for tier in problem.tiers)
    return Facts(
        problem=problem,
        order=order(problem),
        op_s=_times(problem, reach, free),
        enter_s=tuple(
            tier.step_overhead_s + (link.latency_s if link else 0.0)
            for tier, link in zip(problem.tiers, onward, strict=True)
        ),
        byte_s=tuple(1 / link.bytes_per_s if link else 0.0 for link in onward),
        back_s=tuple(link.latency_s if link else 0.0 for link in back),
        back_byte_s=tuple(1 / link.bytes_per_s if link else 0.0 for link in back),
        wires=tuple(
            Wire(size_bytes=t.size_bytes, producer=t.producer, consumers=t.consumers)
            for t in problem.tensors
            if t.consumers
        ),
        answers=tuple((t.producer, t.size_bytes) for t in problem.tensors if t.returned and t.producer is not None),
        free_bytes=free,
    )


def _reach(problem: GraphProblem) -> tuple[int, int]:
    """Tiers that work can be sent to, and those that answers come back from."""
    joined = {(link.source, link.target) for link in problem.links}
    nodes = [tier.node for tier in problem.tiers]
    pairs = list(pairwise(nodes))
    there = next((k for k, pair in enumerate(pairs, 1) if pair not in joined), len(nodes))
    back = next((k for k, (a, b) in enumerate(pairs, 1) if (b, a) not in joined), len(nodes))
    return there, back


def _times(problem: GraphProblem, reach: tuple[int, int], free: Sequence[int]) -> tuple[tuple[float, ...], ...]:
    there, back = reach
    returned = {t.producer for t in problem.tensors if t.returned}
    owner = dict(owners(problem))

    def seconds(k: int, op: int) -> float:
        tier, spec = problem.tiers[k], problem.ops[op]
        linked = k < there and (op not in returned or k < back)
        fits = math.ceil(tier.weights_factor * spec.weights_bytes) + spec.workspace_bytes <= free[k]
        return tier.op_s[op] if linked and fits and owner.get(op, tier.node) == tier.node else INF

    ops = range(len(problem.ops))
    return tuple(tuple(seconds(k, op) for op in ops) for k in range(len(problem.tiers)))


def latency_s(known: Facts, labels: Labels) -> float:
    """Of one request; infinite where an operator may not be, or a reader stands before what it reads; memory aside."""
    if not follows(known, labels):
        return INF
    compute_s = sum(known.op_s[tier][op] for op, tier in enumerate(labels))
    return compute_s + sum(_through_s(known, labels, k) for k in range(max(labels) + 1))


def _through_s(known: Facts, labels: Labels, k: int) -> float:
    """Reaching tier *k*, with what is sent there, and coming back from it."""
    sent = sum(wire.size_bytes for wire in crossing(known, labels, k))
    return known.enter_s[k] + known.byte_s[k] * sent + _back_s(known, labels, k)


def worst_s(known: Facts) -> float:
    """More than any placement takes."""
    compute_s = sum(max((cost for cost in row if cost < INF), default=0.0) for row in zip(*known.op_s, strict=True))
    sent = sum(wire.size_bytes for wire in known.wires) * sum(known.byte_s)
    back = sum(size for _, size in known.answers) * sum(known.back_byte_s)
    return compute_s + sent + back + sum(known.enter_s) + sum(known.back_s)


def follows(known: Facts, labels: Labels) -> bool:
    """Whether no operator stands before one that it reads from."""
    return all(
        labels[wire.producer] <= labels[consumer]
        for wire in known.wires
        if wire.producer is not None
        for consumer in wire.consumers
    )


def crossing(known: Facts, labels: Labels, k: int) -> list[Wire]:
    """Tensors that go from tier *k* - 1 to tier *k*."""
    return [wire for wire in known.wires if k and crosses(wire, labels, k)]


def crosses(wire: Wire, labels: Labels, k: int) -> bool:
    """Whether it is made before tier *k* and read there or beyond."""
    made = 0 if wire.producer is None else labels[wire.producer]
    return made < k <= max(labels[consumer] for consumer in wire.consumers)


def _back_s(known: Facts, labels: Labels, k: int) -> float:
    sizes = _returning(known, labels, k)
    return known.back_s[k] + known.back_byte_s[k] * sum(sizes) if sizes else 0.0


def _returning(known: Facts, labels: Labels, k: int) -> list[int]:
    return [size for producer, size in known.answers if k and labels[producer] >= k]


def memory_bytes(problem: GraphProblem, k: int, ops: Sequence[int]) -> int:
    """What tier *k* needs to run *ops*: fixed cost, packed weights (shared ones once), the largest workspace."""
    tier = problem.tiers[k]
    if not ops:
        return 0 if k else tier.fixed_bytes
    workspace = max(problem.ops[op].workspace_bytes for op in ops)
    return tier.fixed_bytes + math.ceil(tier.weights_factor * stored_bytes(problem, ops)) + workspace


def stored_bytes(problem: GraphProblem, ops: Sequence[int]) -> int:
    """Weights of *ops*, each tensor once."""
    held = set(ops)
    twice = sum(shared.size_bytes * max(0, len(held.intersection(shared.ops)) - 1) for shared in problem.shared)
    return sum(problem.ops[op].weights_bytes for op in ops) - twice


def overflow_bytes(known: Facts, labels: Labels) -> tuple[int, ...]:
    """By how much each tier exceeds its memory."""
    by_tier = on_tiers(known, labels)
    tiers = known.problem.tiers
    return tuple(
        max(0, memory_bytes(known.problem, k, ops) - tiers[k].memory_budget_bytes + tiers[k].memory_promised_bytes)
        for k, ops in enumerate(by_tier)
    )


def on_tiers(known: Facts, labels: Labels) -> list[list[int]]:
    """Operators of each tier, in an order in which they can run."""
    found: list[list[int]] = [[] for _ in known.problem.tiers]
    for op in known.order:
        found[labels[op]].append(op)
    return found


def parts(known: Facts, labels: Labels) -> tuple[Part, ...]:
    """The tiers up to the last one in use, with their figures."""
    by_tier = on_tiers(known, labels)
    return tuple(_part(known, labels, k, by_tier[k]) for k in range(max(labels) + 1))


def _part(known: Facts, labels: Labels, k: int, ops: list[int]) -> Part:
    problem, onward = known.problem, k + 1 <= max(labels)
    sent = [t for t in problem.tensors if t.consumers and onward and _goes(t.producer, t.consumers, labels, k + 1)]
    link_s = known.enter_s[k + 1] - problem.tiers[k + 1].step_overhead_s if onward else 0.0
    size_bytes = sum(t.size_bytes for t in sent)
    return Part(
        node=problem.tiers[k].node,
        ops=tuple(ops),
        names=tuple(problem.ops[op].name for op in ops),
        weights_bytes=stored_bytes(problem, ops),
        memory_bytes=memory_bytes(problem, k, ops),
        compute_s=problem.tiers[k].step_overhead_s + sum(known.op_s[k][op] for op in ops),
        sends=tuple(t.name for t in sent),
        send_bytes=size_bytes,
        send_s=link_s + known.byte_s[k + 1] * size_bytes if onward else 0.0,
        return_bytes=sum(_returning(known, labels, k)),
        return_s=_back_s(known, labels, k),
    )


def _goes(producer: int | None, consumers: tuple[int, ...], labels: Labels, k: int) -> bool:
    return crosses(Wire(size_bytes=0, producer=producer, consumers=consumers), labels, k)
