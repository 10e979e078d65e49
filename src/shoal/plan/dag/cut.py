"""The cheapest tiers for all operators, memory aside: one least cut, exact for any number of tiers in a line.

Vertex (op, k), k = 1 .. K-1, is on the source's side where the operator's tier is k or beyond (Ishikawa's layers).  Cut
edges are what is paid:

    (op, k) -> (op, k+1)    the operator's seconds on tier k; the source stands for k = 0, the sink for k = K
    read(t, k) -> (p, k)    bytes of tensor t over the link to tier k: read there or beyond, made by p before it.  A vertex
                            read(t, k) that every reader of t at k or beyond pulls to its side counts the tensor once,
                            however many readers it has; the sink stands for the producer of an input
    used(k) -> sink         overhead and latency of reaching tier k, pulled by every operator there or beyond; likewise
                            for answers on their way back

Endless edges hold the rest: a tier's order ((op, k+1) -> (op, k)), and that no reader stands before what it reads
((p, k) -> (reader, k)).

A price on bytes held by a tier adds to the operators' seconds, which keeps the network's form: memory is handled
outside (`shoal.plan.dag.memory`).  Every capacity is rounded down to an integer, so that the flow is a true lower bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.plan.dag.cost import INF, Facts, Labels, worst_s
from shoal.plan.dag.flow import Network, least_cut

RESOLUTION = 2**50
"""Integers that all finite costs together make; what rounding forgives is some 1e-12 of them."""
SMALLEST_S = 1e-200
"""Less is nothing: its inverse would leave the numbers that there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """The least sum of costs, as a true lower bound, and operators' tiers that have it up to rounding."""

    bound: float
    labels: Labels


Costs = Sequence[Sequence[float]]
"""[tier][op]; infinite where an operator may not be."""


def cheapest_cut(known: Facts, costs: Costs) -> Cut | None:
    """Minimise *costs* of all operators and what is sent; None when no tiers are allowed for all."""
    if any(min(costs[k][op] for k in range(len(costs))) == INF for op in known.order):
        return None
    return _Layers(known, costs).solve()


class _Layers:
    """The network of one problem; it is used up by solving it."""

    def __init__(self, known: Facts, costs: Costs) -> None:
        self.known, self.costs = known, costs
        self.tiers, self.net = len(costs), Network()
        self.source, self.sink = self.net.vertex(), self.net.vertex()
        self.at = [[self.source, *(self.net.vertex() for _ in range(1, self.tiers)), self.sink] for _ in known.order]
        whole = sum(cost for row in costs for cost in row if cost < INF) + self.tiers * worst_s(known)
        self.scale = RESOLUTION / max(whole, SMALLEST_S)
        self.endless = 2 * RESOLUTION

    def solve(self) -> Cut | None:
        """The least cut."""
        self._operators()
        self._tensors()
        self._entries()
        flow, near = least_cut(self.net, self.source, self.sink, self.endless)
        if flow >= self.endless:
            return None
        labels = tuple(sum(near[vertex] for vertex in row[1:-1]) for row in self.at)
        return Cut(bound=flow / self.scale + self.known.enter_s[0], labels=labels)

    def _whole(self, cost: float) -> int:
        return self.endless if cost == INF else int(cost * self.scale)

    def _operators(self) -> None:
        back = [[0.0] * len(self.at) for _ in range(self.tiers)]
        for producer, size in self.known.answers:
            for k in range(1, self.tiers):
                back[k][producer] += size * sum(self.known.back_byte_s[1 : k + 1])
        for op, row in enumerate(self.at):
            for k in range(self.tiers):
                opposite = self.endless if k and k + 1 < self.tiers else 0
                self.net.edge(row[k], row[k + 1], self._whole(self.costs[k][op] + back[k][op]), opposite)

    def _tensors(self) -> None:
        for wire in self.known.wires:
            for k in range(1, self.tiers):
                made = self.sink if wire.producer is None else self.at[wire.producer][k]
                read = self._any([self.at[consumer][k] for consumer in wire.consumers])
                self.net.edge(read, made, self._whole(wire.size_bytes * self.known.byte_s[k]))
                if wire.producer is not None:
                    for consumer in wire.consumers:
                        self.net.edge(made, self.at[consumer][k], self.endless)

    def _entries(self) -> None:
        """An operator that is read stands before its readers, so those that nobody reads speak for all."""
        made = {wire.producer for wire in self.known.wires}
        ends = [op for op in self.known.order if op not in made]
        answers = sorted({producer for producer, _ in self.known.answers})
        for k in range(1, self.tiers):
            for ops, cost in ((ends, self.known.enter_s[k]), (answers, self.known.back_s[k])):
                if ops and cost:
                    self.net.edge(self._any([self.at[op][k] for op in ops]), self.sink, self._whole(cost))

    def _any(self, vertices: Sequence[int]) -> int:
        """A vertex that is on the source's side as soon as one of *vertices* is."""
        if len(vertices) == 1:
            return vertices[0]
        joint = self.net.vertex()
        for vertex in vertices:
            self.net.edge(vertex, joint, self.endless)
        return joint
