"""Is a graph problem well formed?  Solvers trust it afterwards; whether it can be solved is theirs to say."""

import heapq
from collections.abc import Sequence
from itertools import pairwise

from shoal.errors import InvalidRequestError
from shoal.ids import NodeId
from shoal.plan.check import LARGEST, SLOWEST_BYTES_PER_S, fault, not_negative, unique
from shoal.plan.dag.problem import GraphProblem, TensorSpec, TierLink

LARGEST_GRAPH = 200_000
"""Operators and tensors times tiers: a cut through more takes hours."""


def check_graph(problem: GraphProblem) -> None:
    """Raise InvalidRequestError naming the first field that makes no sense."""
    if not problem.ops:
        raise fault("the problem has no operators", "ops")
    if not problem.tiers:
        raise fault("the problem has no tiers", "tiers")
    _check_size(problem)
    unique([tier.node for tier in problem.tiers], "tier")
    unique([tensor.name for tensor in problem.tensors], "tensor")
    unique([f"{link.source} to {link.target}" for link in problem.links], "link")
    for index, op in enumerate(problem.ops):
        not_negative((op.weights_bytes, op.workspace_bytes), f"ops[{index}]", f"a size of operator {index} ({op.name})")
    for index, tensor in enumerate(problem.tensors):
        _check_tensor(problem, tensor, f"tensors[{index}]")
    _check_tiers(problem)
    for link in problem.links:
        _check_link(problem, link)
    _check_shared(problem)
    _check_sums(problem)
    _check_pins(problem, order(problem))


def order(problem: GraphProblem) -> tuple[int, ...]:
    """Operators in an order in which they can run, the nearest to the problem's; raises InvalidRequestError for a circle."""
    readers: list[list[int]] = [[] for _ in problem.ops]
    waits = [0] * len(problem.ops)
    for tensor in problem.tensors:
        if tensor.producer is not None:
            readers[tensor.producer] += tensor.consumers
            for consumer in tensor.consumers:
                waits[consumer] += 1
    ready = [op for op, count in enumerate(waits) if not count]
    found: list[int] = []
    while ready:
        found.append(heapq.heappop(ready))
        for reader in readers[found[-1]]:
            waits[reader] -= 1
            if not waits[reader]:
                heapq.heappush(ready, reader)
    if len(found) < len(problem.ops):
        raise _circle(problem, waits)
    return tuple(found)


def _circle(problem: GraphProblem, waits: Sequence[int]) -> InvalidRequestError:
    """Going back from an operator that waits, from maker to maker, some operator must come again."""
    makers: dict[int, int] = {}
    for tensor in problem.tensors:
        if tensor.producer is not None and waits[tensor.producer]:
            makers.update(dict.fromkeys(tensor.consumers, tensor.producer))
    way = [next(op for op, count in enumerate(waits) if count)]
    while way[-1] not in way[:-1]:
        way.append(makers[way[-1]])
    names = " <- ".join(f"{op} ({problem.ops[op].name})" for op in way[way.index(way[-1]) :])
    return fault(f"operators read each other in a circle: {names}", "tensors")


def _check_tensor(problem: GraphProblem, tensor: TensorSpec, param: str) -> None:
    not_negative((tensor.size_bytes,), f"{param}.size_bytes", f"the size of tensor {tensor.name}")
    ends = (*tensor.consumers, *(() if tensor.producer is None else (tensor.producer,)))
    for op in ends:
        _known(problem, op, f"tensor {tensor.name} names", param)
    unique([str(op) for op in tensor.consumers], f"reader of tensor {tensor.name}:")


def _known(problem: GraphProblem, op: int, what: str, param: str) -> None:
    if not 0 <= op < len(problem.ops):
        raise fault(f"{what} operator {op}, there are 0 to {len(problem.ops) - 1}", param)


def _check_tiers(problem: GraphProblem) -> None:
    for tier in problem.tiers:
        if len(tier.op_s) != len(problem.ops):
            raise fault(f"{tier.node} has {len(tier.op_s)} times for {len(problem.ops)} operators", "tiers.op_s")
        not_negative(tier.op_s, "tiers.op_s", f"a time of {tier.node}")
        sizes = (tier.memory_budget_bytes, tier.memory_promised_bytes, tier.fixed_bytes)
        not_negative((*sizes, tier.weights_factor, tier.step_overhead_s), "tiers", f"a figure of {tier.node}")
        not_negative((sum(tier.op_s),), "tiers.op_s", f"the sum of all times of {tier.node}")


def _check_link(problem: GraphProblem, link: TierLink) -> None:
    name = f"the link from {link.source} to {link.target}"
    nodes = [tier.node for tier in problem.tiers]
    for end in (link.source, link.target):
        if end not in nodes:
            raise fault(f"{name} names {end}, which is no tier here", "links")
    neighbours = {*pairwise(nodes), *pairwise(reversed(nodes))}
    if (link.source, link.target) not in neighbours:
        raise fault(
            f"{name} does not join neighbours: the line is {' - '.join(nodes)}",
            "links",
            hint="order the tiers so that each sends to the next, or leave tiers out",
        )
    not_negative((link.latency_s,), "links.latency_s", f"latency_s of {name}")
    if not SLOWEST_BYTES_PER_S <= link.bytes_per_s <= LARGEST:
        raise fault(
            f"bytes_per_s of {name} is {link.bytes_per_s}; it must lie between {SLOWEST_BYTES_PER_S} and {LARGEST:g}",
            "links.bytes_per_s",
            hint="leave out a link that carries nothing",
        )


def _check_shared(problem: GraphProblem) -> None:
    held = [0] * len(problem.ops)
    for tensor in problem.shared:
        not_negative((tensor.size_bytes,), "shared.size_bytes", "the size of shared weights")
        unique([str(op) for op in tensor.ops], "user of shared weights:")
        for op in tensor.ops:
            _known(problem, op, "shared weights name", "shared.ops")
            held[op] += tensor.size_bytes
    for op, (spec, size_bytes) in enumerate(zip(problem.ops, held, strict=True)):
        if size_bytes > spec.weights_bytes:
            raise fault(
                f"operator {op} has {spec.weights_bytes} bytes of weights, {size_bytes} of them shared",
                "shared.size_bytes",
                hint="weights_bytes counts shared weights, too",
            )


def _check_sums(problem: GraphProblem) -> None:
    """What all of it together takes must be a number, too."""
    held, sent = sum(op.weights_bytes for op in problem.ops), sum(tensor.size_bytes for tensor in problem.tensors)
    not_negative((held, sent), "tensors", "the sum of all sizes")
    waits = (*(link.latency_s for link in problem.links), *(tier.step_overhead_s for tier in problem.tiers))
    not_negative((sum(waits),), "links.latency_s", "the sum of all latencies and overheads")


def _check_size(problem: GraphProblem) -> None:
    count = (len(problem.ops) + len(problem.tensors)) * len(problem.tiers)
    if count > LARGEST_GRAPH:
        raise fault(
            f"{len(problem.ops)} operators, {len(problem.tensors)} tensors and {len(problem.tiers)} tiers are too many",
            "ops",
            hint=f"keep (operators + tensors) x tiers below {LARGEST_GRAPH}: let operators that stay together be one",
        )


def _check_pins(problem: GraphProblem, way: Sequence[int]) -> None:
    """Pins must name tiers, agree, and not want a reader before what it reads."""
    rank = {tier.node: index for index, tier in enumerate(problem.tiers)}
    for pin in problem.pins:
        _known(problem, pin.op, "a pin names", "pins")
        if pin.node not in rank:
            raise fault(f"operator {pin.op} is pinned to {pin.node}, which is no tier here", "pins")
    wanted: dict[int, NodeId] = {}
    for op, node in owners(problem):
        if wanted.setdefault(op, node) != node:
            raise fault(
                f"operator {op} ({problem.ops[op].name}) belongs on both {wanted[op]} and {node}",
                "pins",
                hint="drop a pin, or set pin_inputs to false",
            )
    _check_direction(problem, way, {op: rank[node] for op, node in wanted.items()})


def _check_direction(problem: GraphProblem, way: Sequence[int], wanted: dict[int, int]) -> None:
    """Each operator's earliest tier, by what stands before it; a pin before that is a contradiction."""
    readers: list[list[int]] = [[] for _ in problem.ops]
    for tensor in problem.tensors:
        if tensor.producer is not None:
            readers[tensor.producer] += tensor.consumers
    least = [(0, op) for op in range(len(problem.ops))]
    for op in way:
        tier, cause = least[op]
        if op in wanted and wanted[op] < tier:
            raise fault(
                f"operator {op} ({problem.ops[op].name}) belongs on {problem.tiers[wanted[op]].node}, yet it needs what "
                f"operator {cause} ({problem.ops[cause].name}) makes on {problem.tiers[tier].node}, and work does not "
                "return to an earlier tier",
                "pins",
                hint="drop one of the two pins; an answer that the source wants is a tensor with `returned`",
            )
        here = (wanted[op], op) if op in wanted else least[op]
        for reader in readers[op]:
            least[reader] = max(least[reader], here)


def owners(problem: GraphProblem) -> list[tuple[int, NodeId]]:
    """Operators that belong on one tier, by pins and by the rule for inputs."""
    found = [(pin.op, pin.node) for pin in problem.pins]
    if problem.pin_inputs:
        readers = {op: None for tensor in problem.tensors if tensor.producer is None for op in tensor.consumers}
        found += [(op, problem.tiers[0].node) for op in readers]
    return found
