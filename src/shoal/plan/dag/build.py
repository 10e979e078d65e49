"""From a model's graph and a chain's problem to the question of where to cut through operators.

Devices were timed block by block; within a block the time is spread in proportion to the operators' arithmetic.  So an
operator that waits for memory rather than for arithmetic is taken for quicker than it is: what a cut through a block
gains is an estimate, what a block takes as a whole is measured.  Constant and cheap operators that shards repeat
(`shoal.model.graph`) belong to their readers here, too.  A tensor of unknown size, or one that grows faster than its rows,
is never cut: all that runs between its maker and its last reader stays together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from shoal.errors import InvalidRequestError
from shoal.ids import NodeId
from shoal.model.frontier import Block
from shoal.model.graph import Graph
from shoal.plan.budget import Budget
from shoal.plan.cost import barred, prefill_steps
from shoal.plan.dag.placement import place_graph
from shoal.plan.dag.problem import (
    GraphAnswer,
    GraphProblem,
    OpPin,
    OpSpec,
    SharedWeights,
    TensorSpec,
    TierLink,
    TierSpec,
)
from shoal.plan.problem import DeviceSpec, Limits, Objective, Problem

SHARED_BYTES = 4096
"""Smaller weights that several operators read are counted for each of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A graph problem, and the positions of its operators' order at which the model's blocks meet."""

    problem: GraphProblem
    cuts: tuple[int, ...]


def split(
    problem: Problem, graph: Graph, blocks: Sequence[Block], tiers: Sequence[NodeId], budget: Budget
) -> GraphAnswer:
    """The best cut of a model over *tiers*, the source first: between blocks where that is as good as any, else through them."""
    asked = question(problem, graph, blocks, tiers)
    return place_graph(asked.problem, budget, asked.cuts)


def question(problem: Problem, graph: Graph, blocks: Sequence[Block], tiers: Sequence[NodeId]) -> Question:
    """State *problem*, whose blocks are *blocks* of *graph*, operator by operator; raises InvalidRequestError."""
    _check(problem, graph, blocks, tiers)
    pieces = _pieces(graph)
    home = _home(blocks, pieces)
    devices = {device.node: device for device in problem.devices}
    rounds = prefill_steps(problem.shape)
    shares = _shares(graph, pieces, home, len(blocks))
    asked = GraphProblem(
        ops=tuple(_op(problem, graph, piece, block) for piece, block in zip(pieces, home, strict=True)),
        tensors=tuple(_tensors(graph, pieces, problem.shape.tokens_in)),
        tiers=tuple(_tier(devices[node], shares, rounds) for node in tiers),
        links=tuple(_links(problem, tiers, rounds)),
        pin_inputs=False,
        pins=tuple(_pins(problem, blocks, pieces)),
        shared=tuple(_shared(graph, pieces)),
    )
    return Question(problem=asked, cuts=tuple(at for at in range(1, len(home)) if home[at] != home[at - 1]))


def _check(problem: Problem, graph: Graph, blocks: Sequence[Block], tiers: Sequence[NodeId]) -> None:
    shape, devices = problem.shape, {device.node for device in problem.devices}
    if len(blocks) != len(problem.blocks) or blocks[-1].node_stop != len(graph.nodes):
        raise InvalidRequestError(f"a problem of {len(problem.blocks)} blocks is not about these {len(blocks)} blocks")
    if shape.tokens_out != 1 or problem.objective is not Objective.LATENCY or problem.limits != Limits():
        raise InvalidRequestError(
            "operators are placed for the latency of one pass, within no limits",
            hint="ask for latency and one token out; models with a cache are chains of layers: plan them as chains",
        )
    if problem.pin_last or not tiers or tiers[0] != problem.source:
        raise InvalidRequestError(
            f"the line of tiers begins at the source {problem.source} and does not come back to it",
            hint="name the source first, and set pin_last to false: answers return by themselves",
        )
    for node in tiers:
        if node not in devices or node in barred(problem):
            raise InvalidRequestError(f"{node} may hold no block here", hint="leave it out of the tiers", param="tiers")


Piece = tuple[int, ...]
"""Positions of spine nodes that stay together, in order."""


def _pieces(graph: Graph) -> list[Piece]:
    """One spine node each, or all between the maker and the last reader of a tensor whose size is unknown."""
    spine = [at for at, node in enumerate(graph.nodes) if node.spine]
    place = {at: index for index, at in enumerate(spine)}
    last = _last_readers(graph)
    pieces: list[list[int]] = []
    until = -1
    for at in spine:
        if place[at] <= until:
            pieces[-1].append(at)
        else:
            pieces.append([at])
        unknown = [v for v in graph.nodes[at].outputs if v in last and _bytes(graph, v, 0) is None]
        until = max(until, *(place[last[v]] for v in unknown), -1)
    return [tuple(piece) for piece in pieces]


def _last_readers(graph: Graph) -> dict[str, int]:
    return {
        value: at for at, node in enumerate(graph.nodes) if node.spine for value in graph.carried[at]
    }  # a later reader replaces an earlier one


def _bytes(graph: Graph, value: str, tokens: int) -> int | None:
    known = graph.types.get(value)
    if known is None or known.bytes_fixed is None or known.bytes_per_token is None:
        return None
    if known.bytes_fixed < 0:  # grows faster than its rows do (attention scores): two points do not tell its size
        return None
    return known.bytes_fixed + known.bytes_per_token * tokens


def _home(blocks: Sequence[Block], pieces: Sequence[Piece]) -> list[int]:
    """Each piece's block; one that reaches into several belongs to the last of them, so that no cut lies within it."""
    stops = [block.node_stop for block in blocks]
    return [next(index for index, stop in enumerate(stops) if piece[-1] < stop) for piece in pieces]


def _shares(graph: Graph, pieces: Sequence[Piece], home: Sequence[int], blocks: int) -> list[dict[int, float]]:
    """Of each piece: blocks of which it is a part, and the part."""
    flops = [sum(graph.nodes[at].flops for at in piece) for piece in pieces]
    whole, count = [0] * blocks, [0] * blocks
    for block, amount in zip(home, flops, strict=True):
        whole[block] += amount
        count[block] += 1
    found = [
        {block: amount / whole[block] if whole[block] else 1 / count[block]}
        for block, amount in zip(home, flops, strict=True)
    ]
    for block in range(blocks):  # one whose nodes all went to a later block with a piece that reaches into it
        if not count[block]:
            later = next(index for index, at in enumerate(home) if at > block)
            found[later][block] = 1.0
    return found


def _op(problem: Problem, graph: Graph, piece: Piece, block: int) -> OpSpec:
    first, last = (graph.nodes[at].outputs[0] for at in (piece[0], piece[-1]))
    spec = problem.blocks[block]
    return OpSpec(
        name=first if len(piece) == 1 else f"{first} to {last}",
        weights_bytes=sum(graph.initializers[value] for value in _weights(graph, piece)),
        workspace_bytes=max(spec.workspace_bytes, spec.load_peak_bytes),
    )


def _weights(graph: Graph, piece: Piece) -> list[str]:
    reads = dict.fromkeys(value for at in graph.needed(piece) for value in graph.nodes[at].inputs)
    return [value for value in reads if value in graph.initializers]


def _tensors(graph: Graph, pieces: Sequence[Piece], tokens: int) -> Iterator[TensorSpec]:
    owner = {at: index for index, piece in enumerate(pieces) for at in piece}
    readers: dict[str, dict[int, None]] = {}
    for at, index in owner.items():
        for value in graph.carried[at]:
            readers.setdefault(value, {})[index] = None
    made = {value: index for at, index in owner.items() for value in graph.nodes[at].outputs}
    for value in (*graph.data_inputs, *made):
        producer = made.get(value)
        consumers = tuple(sorted(index for index in readers.get(value, ()) if index != producer))
        returned = value in graph.outputs and producer is not None
        if not consumers and not returned:
            continue
        size_bytes = _bytes(graph, value, tokens)
        if size_bytes is None:
            raise InvalidRequestError(
                f"the size of {value} is unknown", hint="bind the model's dynamic axes to numbers", param=value
            )
        yield TensorSpec(name=value, size_bytes=size_bytes, producer=producer, consumers=consumers, returned=returned)


def _tier(device: DeviceSpec, shares: Sequence[dict[int, float]], rounds: int) -> TierSpec:
    return TierSpec(
        node=device.node,
        op_s=tuple(sum(part * device.prefill_s[block] for block, part in share.items()) for share in shares),
        memory_budget_bytes=device.memory_budget_bytes,
        memory_promised_bytes=device.memory_promised_bytes,
        fixed_bytes=device.fixed_bytes,
        weights_factor=device.weights_factor,
        step_overhead_s=rounds * device.step_overhead_s,
    )


def _links(problem: Problem, tiers: Sequence[NodeId], rounds: int) -> Iterator[TierLink]:
    pairs = {*pairwise(tiers), *pairwise(tuple(reversed(tiers)))}
    for link in problem.links:
        if (link.source, link.target) in pairs:
            yield TierLink(
                source=link.source,
                target=link.target,
                latency_s=rounds * link.latency_s,
                bytes_per_s=link.bytes_per_s,
            )


def _pins(problem: Problem, blocks: Sequence[Block], pieces: Sequence[Piece]) -> Iterator[OpPin]:
    """What touches a pinned block belongs where the block does."""
    owner = {pin.block: pin.node for pin in problem.pins}
    if problem.pin_first:
        owner[0] = problem.source
    spans = [(blocks[block], node) for block, node in owner.items()]
    for op, piece in enumerate(pieces):
        nodes = {node for block, node in spans if piece[0] < block.node_stop and piece[-1] >= block.node_start}
        for node in sorted(nodes):
            yield OpPin(op=op, node=node)


def _shared(graph: Graph, pieces: Sequence[Piece]) -> Iterator[SharedWeights]:
    users: dict[str, list[int]] = {}
    for index, piece in enumerate(pieces):
        for value in _weights(graph, piece):
            if graph.initializers[value] >= SHARED_BYTES:
                users.setdefault(value, []).append(index)
    for value, ops in users.items():
        if len(ops) > 1:
            yield SharedWeights(size_bytes=graph.initializers[value], ops=tuple(ops))
