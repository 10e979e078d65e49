"""Which positions of a graph are its frontiers.

Problem: a cut is worth having where few bytes cross it, and there must be one wherever a planner may want to balance
work; graphs rise and fall in width, at the ends (ids, pooled vectors) often far below the body.  Rule: a position is a
candidate when what crosses it is at most 1.5 x the least in its *basin*: the neighbouring positions that are reached
without passing anything twice as wide, nor more than an eighth of the work.  Of candidates with next to no work
between them (of unlike ones, within a 64th of the work) one is kept: the narrowest; then the one whose tensors have
most readers (a residual stream rather than a branch of it); then the last, or the first where a normalisation follows
(a layer begins with its norm).  Widths count at least four bytes per element: half-way through a dequantisation is not
a narrower place.
Rejected: a fixed byte limit (no scale fits a detector and a language model), cutting after every layer by name.
"""

from dataclasses import dataclass

import onnx

from shoal.model.graph import COSTLY, Graph

WIDTH_SLACK = 1.5
HILL = 2.0
BASIN_SHARE = 1 / 8
LIGHT_SHARE = 1 / 1024
"""Less than this share of the model's work and weights is next to nothing."""
CLOSE_SHARE = 1 / 64
"""Within less than this share a second cut must be as good as the first."""
_NORMS = frozenset(
    {
        "RMSNormalization",
        "LayerNormalization",
        "SimplifiedLayerNormalization",
        "InstanceNormalization",
        "GroupNormalization",
    }
    | {"SkipSimplifiedLayerNormalization", "SkipLayerNormalization", "ReduceMean", "ReduceSumSquare", "Pow"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A position: nodes before it are on one side; `crossing` are the values that travel, in a fixed order."""

    position: int
    crossing: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    position: int
    width: float
    readers: int


def crossing(graph: Graph, positions: list[int]) -> list[Cut]:
    """What crosses each of the given positions, in ascending order; results of nodes come before graph inputs."""
    born, last = _lifetimes(graph)
    order = sorted(born, key=lambda v: (v in graph.data_inputs, born[v]))
    return [Cut(position=p, crossing=tuple(v for v in order if born[v] <= p <= last.get(v, -1))) for p in positions]


def frontiers(graph: Graph, model: onnx.ModelProto) -> list[Cut]:
    """The model's cuts, its two ends apart."""
    work = _work(graph, model)
    candidates = _candidates(graph, work)
    kept = [c for i, c in enumerate(candidates) if c.width <= WIDTH_SLACK * _basin_floor(candidates, i, work)]
    groups: list[list[_Candidate]] = []
    for c in kept:
        if groups and work[c.position] - work[groups[-1][-1].position] <= LIGHT_SHARE:
            groups[-1].append(c)
        else:
            groups.append([c])
    best = [_best(group, graph, model) for group in groups]
    return crossing(graph, [c.position for c in _apart(best, graph, work)])


def _apart(candidates: list[_Candidate], graph: Graph, work: list[float]) -> list[_Candidate]:
    """Drop candidates that stand close to a better one, unless the same kinds of tensors cross both (a repeated layer)."""
    kinds = dict(zip((c.position for c in candidates), _signatures(graph, candidates), strict=True))
    kept: list[_Candidate] = []
    for c in sorted(candidates, key=lambda c: (c.width, c.position)):
        near = (k for k in kept if abs(work[k.position] - work[c.position]) <= CLOSE_SHARE)
        if all(kinds[k.position] == kinds[c.position] for k in near):
            kept.append(c)
    return sorted(kept, key=lambda c: c.position)


def _signatures(graph: Graph, candidates: list[_Candidate]) -> list[object]:
    cuts = crossing(graph, [c.position for c in candidates])
    return [sorted((graph.types[v].dtype, graph.types[v].dims or ()) for v in cut.crossing) for cut in cuts]


def _lifetimes(graph: Graph) -> tuple[dict[str, int], dict[str, int]]:
    """First position at which a travelling value exists, and last position at which it is still needed."""
    born = dict.fromkeys(graph.data_inputs, 0)
    born |= {o: at + 1 for at, n in enumerate(graph.nodes) if n.spine for o in n.outputs}
    last = dict.fromkeys((v for v in graph.outputs if v in born), len(graph.nodes))
    for at, (node, carried) in enumerate(zip(graph.nodes, graph.carried, strict=True)):
        if node.spine:
            last.update((v, max(at, last.get(v, -1))) for v in carried)
    return born, last


def _candidates(graph: Graph, work: list[float]) -> list[_Candidate]:
    """Positions after a spine node, of known width, with work on both sides."""
    born, last = _lifetimes(graph)
    readers: dict[str, int] = {}
    for node, carried in zip(graph.nodes, graph.carried, strict=True):
        if node.spine:
            readers.update((v, readers.get(v, 0) + 1) for v in carried)
    ends: dict[int, list[str]] = {}
    for value, position in last.items():
        ends.setdefault(position, []).append(value)
    live = {v for v in graph.data_inputs if v in last}
    found: list[_Candidate] = []
    for at, node in enumerate(graph.nodes):
        live -= set(ends.get(at, ()))
        live |= {o for o in node.outputs if born.get(o) == at + 1 and last.get(o, -1) > at}
        inside = work[at + 1] > LIGHT_SHARE and work[-1] - work[at + 1] > LIGHT_SHARE
        if node.spine and inside:
            width = sum(_width(graph, v) for v in live)
            found.append(_Candidate(position=at + 1, width=width, readers=sum(readers.get(v, 0) for v in live)))
    return found


def _width(graph: Graph, value: str) -> float:
    known = graph.types.get(value)
    if known is None or known.nominal_bytes is None or known.elements is None:
        return float("inf")
    return float(max(known.nominal_bytes, 4 * known.elements))


def _work(graph: Graph, model: onnx.ModelProto) -> list[float]:
    """Share of the model's work and weights before each position; light operators count nothing."""
    weights = {
        v: held for v, held in graph.initializers.items() if v in graph.types and len(graph.types[v].shape or ()) >= 2
    }
    flops, held = [0], [0]
    below: dict[str, int] = dict(weights)
    for node in graph.nodes:
        own = sum(below.get(v, 0) for v in node.inputs)
        if not node.spine:
            below.update(dict.fromkeys(node.outputs, own))
            own = 0
        op = model.graph.node[node.source].op_type
        costly = node.spine and (own > 0 or op in COSTLY or "Attention" in op)
        flops.append(flops[-1] + (node.flops if costly else 0))
        held.append(held[-1] + own)
    return [(f / max(1, flops[-1]) + h / max(1, held[-1])) / 2 for f, h in zip(flops, held, strict=True)]


def _basin_floor(candidates: list[_Candidate], at: int, work: list[float]) -> float:
    """Least width in the basin of the candidate."""
    here = candidates[at]
    floor = here.width
    for side in (range(at - 1, -1, -1), range(at + 1, len(candidates))):
        for i in side:
            other = candidates[i]
            if other.width > HILL * here.width or abs(work[other.position] - work[here.position]) > BASIN_SHARE:
                break
            floor = min(floor, other.width)
    return floor if floor != float("inf") else -1.0


def _best(group: list[_Candidate], graph: Graph, model: onnx.ModelProto) -> _Candidate:
    width = min(c.width for c in group)
    equal = [c for c in group if c.width <= width * 1.001]
    most = max(c.readers for c in equal)
    equal = [c for c in equal if c.readers == most]
    between = range(equal[0].position, equal[-1].position)
    normed = any(model.graph.node[graph.nodes[i].source].op_type in _NORMS for i in between)
    return equal[0] if normed else equal[-1]
