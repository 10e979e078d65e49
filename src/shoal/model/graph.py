"""An ONNX graph as a value: a chain of spine nodes, and what each of them can derive again by itself.

Problem: exported graphs compute masks, rotary tables and target shapes once and use them in every layer, and keep
dequantised weights as inner values.  Sent along, they would cross every cut.  Rule: a node is

- *constant* when all it reads is constant: it is repeated in every shard that needs it;
- *free* when it is cheap and reads only constants, per-step inputs (positions, lengths: each session feeds them
  locally), integer inputs of rank <= 2 (masks, segment ids: a few bytes per token) and extents (results of `Shape`):
  it is repeated too, and only those sources travel;
- *spine* otherwise.  Token ids and features are never repeated from, random operators are always spine.

Constant and free nodes stand directly before their first reader, so that the first block that needs one holds it.
Nodes that no output depends on are left out.
"""

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx

from shoal.errors import CorruptFileError
from shoal.model import spec
from shoal.model.flops import node_flops
from shoal.model.shapes import TOKENS, ValueType, has_cache, is_sequence, tensor_bytes, value_types, weight_type

STEP_INPUTS = frozenset(
    {spec.ATTENTION_MASK, spec.POSITION_IDS, spec.SEQLENS_K, spec.TOTAL_SEQUENCE_LENGTH, spec.LOGIT_ROWS}
)
FREE_WEIGHTS_BYTES = 64 * 1024
"""Constants that a free node may read when its sources travel: more is a weight of the model, not a table."""
FREE_TABLE_BYTES = 64 * 1024 * 1024
"""The same when nothing travels, e.g. rotary tables looked up by position."""
COSTLY = frozenset(
    {"MatMul", "Gemm", "Conv", "ConvTranspose", "Attention", "Einsum", "MatMulInteger", "QLinearMatMul", "QLinearConv"}
    | {
        "ConvInteger",
        "LSTM",
        "GRU",
        "RNN",
        "If",
        "Loop",
        "Scan",
        "SequenceMap",
        "NonMaxSuppression",
        "RoiAlign",
        "Resize",
    }
    | {"MatMulNBits", "GroupQueryAttention", "MultiHeadAttention", "GatherBlockQuantized"}
)
_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"}
)
_EXTENTS = frozenset({"Shape", "Size"})
_INTEGERS = frozenset({onnx.TensorProto.INT32, onnx.TensorProto.INT64, onnx.TensorProto.BOOL})
_STRUCTURED = frozenset({onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS})


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node at its place in the order; `inputs` include what its sub-graphs read from outside.

    `source` is its index in the file; `spine` is False for constant and free nodes; `flops` are per row of the nominal
    step of a sequence model, else per sample.
    """

    source: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    spine: bool
    flops: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """Nodes in a stable topological order, with what is known about their values.

    `carried[i]` are the values that node i needs from outside, seen through constant and free nodes: results of spine
    nodes and graph inputs that are not per-step.
    `initializers` maps weights to their bytes, `types` knows weights and all other values.
    """

    nodes: tuple[Node, ...]
    carried: tuple[frozenset[str], ...]
    producer: Mapping[str, int]
    types: Mapping[str, ValueType]
    initializers: Mapping[str, int]
    data_inputs: tuple[str, ...]
    step_inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    """Those that travel to the end of the chain, `present.*` apart."""

    def needed(self, positions: Iterable[int], wanted: Iterable[str] = ()) -> tuple[int, ...]:
        """The given nodes with the constant and free nodes that they, or the *wanted* values, read.

        Each of those stands before its first reader, in the file's order: equal layers give equal sequences.
        """
        given = list(positions)
        placed: dict[int, None] = {}
        for reads, at in [*((self.nodes[i].inputs, i) for i in given if self.nodes[i].spine), (tuple(wanted), None)]:
            missing = self._repeated(reads, placed)
            placed.update(dict.fromkeys(sorted(missing, key=lambda i: self.nodes[i].source)))
            if at is not None:
                placed[at] = None
        placed.update(dict.fromkeys(given))
        return tuple(placed)

    def _repeated(self, reads: tuple[str, ...], placed: Mapping[int, None]) -> set[int]:
        missing: set[int] = set()
        stack = list(reads)
        while stack:
            at = self.producer.get(stack.pop())
            if at is not None and at not in placed and at not in missing and not self.nodes[at].spine:
                missing.add(at)
                stack.extend(self.nodes[at].inputs)
        return missing


def read_graph(model: onnx.ModelProto, binding: Mapping[str, int] | None = None, *, sizes: bool = True) -> Graph:
    """Read *model*; *binding* gives sizes to dynamic axes by name.

    Without *sizes* (quick; the order is the same) only weights have types and no node has `flops`.
    Raises CorruptFileError when a node reads a value that nothing makes.
    """
    graph = model.graph
    types = (value_types(model, binding) if sizes else {}) | {t.name: weight_type(t) for t in graph.initializer}
    initializers = {t.name: tensor_bytes(t.data_type, t.dims) for t in graph.initializer}
    initializers |= {s.values.name: _sparse_bytes(s) for s in graph.sparse_initializer}
    dims = {t.name: tuple(t.dims) for t in graph.initializer}
    inputs = [i.name for i in graph.input if i.name not in initializers]
    step = tuple(i for i in inputs if has_cache(model) and (i in STEP_INPUTS or i.startswith(spec.PAST_PREFIX)))
    data = tuple(i for i in inputs if i not in step)
    order = _live(graph, _topological(graph, {*inputs, *initializers, ""}))
    sources = _classify(graph, order, initializers, data, step)
    placed = _placed(graph, order, sources.repeated)
    rows = TOKENS if is_sequence(model) else 1
    nodes = tuple(
        Node(
            source=i,
            inputs=_reads(graph.node[i]),
            outputs=tuple(o for o in graph.node[i].output if o),
            spine=i not in sources.repeated,
            flops=node_flops(graph.node[i], types, dims) // rows,
        )
        for i in placed
    )
    return Graph(
        nodes=nodes,
        carried=tuple(sources.of(n.inputs) for n in nodes),
        producer={o: at for at, n in enumerate(nodes) for o in n.outputs},
        types=types,
        initializers=initializers,
        data_inputs=data,
        step_inputs=step,
        outputs=tuple(o.name for o in graph.output if not o.name.startswith(spec.PRESENT_PREFIX)),
    )


@dataclass(frozen=True, slots=True)
class _Sources:
    """Where values come from: `carried[v]` must travel for v to exist elsewhere; `repeated` are constant and free nodes."""

    carried: dict[str, frozenset[str]]
    repeated: set[int]

    def of(self, values: Iterable[str]) -> frozenset[str]:
        return frozenset[str]().union(*(self.carried[v] for v in values))


def _classify(
    graph: onnx.GraphProto,
    order: list[int],
    initializers: Mapping[str, int],
    data: tuple[str, ...],
    step: tuple[str, ...],
) -> _Sources:
    sources = _Sources({v: frozenset() for v in (*initializers, *step)} | {v: frozenset({v}) for v in data}, set())
    small = {v.name for v in graph.input if v.name in data and v.name != spec.INPUT_IDS and _is_small(v)}
    constant_bytes = {**initializers}
    results = {o.name for o in graph.output}
    for i in order:
        node, reads = graph.node[i], _reads(graph.node[i])
        carried = sources.of(reads)
        weights = sum(constant_bytes.get(v, 0) for v in reads)
        constant = all(v in constant_bytes for v in reads)
        limit = FREE_WEIGHTS_BYTES if carried else FREE_TABLE_BYTES
        free = carried <= small and weights <= limit and not (node.op_type in _EXTENTS and set(reads) & set(data))
        if not _is_fixed(node, results) and (constant or (free and node.op_type not in COSTLY)):
            sources.repeated.add(i)
            sources.carried.update((o, carried) for o in node.output if o)
            if constant:
                constant_bytes.update((o, weights) for o in node.output if o)
            continue
        sources.carried.update((o, frozenset({o})) for o in node.output if o)
        if node.op_type in _EXTENTS:
            small.update(node.output)
    return sources


def _is_small(declared: onnx.ValueInfoProto) -> bool:
    """Ids and masks: integers or booleans of at most two axes."""
    kind = declared.type.tensor_type
    return kind.HasField("shape") and len(kind.shape.dim) <= 2 and kind.elem_type in _INTEGERS


def _is_fixed(node: onnx.NodeProto, results: set[str]) -> bool:
    """Nodes that must run once and at one place."""
    if node.op_type in _RANDOM or any(a.type in _STRUCTURED for a in node.attribute):
        return True
    return any(o in results for o in node.output)


def _placed(graph: onnx.GraphProto, order: list[int], repeated: set[int]) -> list[int]:
    """Spine nodes in order, each repeated node as late as possible."""
    maker = {o: i for i in order for o in graph.node[i].output if o}
    placed: dict[int, None] = {}
    rank = {i: at for at, i in enumerate(order)}
    for i in order:
        if i in repeated:
            continue
        waiting, missing = [i], set[int]()
        while waiting:
            for name in _reads(graph.node[waiting.pop()]):
                at = maker.get(name)
                if at in repeated and at not in placed and at not in missing:
                    missing.add(at)
                    waiting.append(at)
        placed.update(dict.fromkeys(sorted(missing, key=rank.__getitem__)))
        placed[i] = None
    return list(placed)


def _live(graph: onnx.GraphProto, order: list[int]) -> list[int]:
    """The nodes that some output depends on."""
    wanted = {o.name for o in graph.output}
    live: list[int] = []
    for i in reversed(order):
        if wanted.intersection(graph.node[i].output):
            live.append(i)
            wanted.update(_reads(graph.node[i]))
    return live[::-1]


def _topological(graph: onnx.GraphProto, known: set[str]) -> list[int]:
    """The file's order where it is one, else the nearest to it."""
    maker = {o: i for i, n in enumerate(graph.node) for o in n.output if o}
    waits: dict[int, int] = {}
    readers: dict[int, list[int]] = {}
    for i, node in enumerate(graph.node):
        reads = {v for v in _reads(node) if v not in known}
        lost = next((v for v in reads if v not in maker), None)
        if lost is not None:
            raise CorruptFileError(
                f"node {i} ({node.op_type}) reads {lost!r}, which nothing makes", hint="export the model again"
            )
        waits[i] = len({maker[v] for v in reads})
        for at in {maker[v] for v in reads}:
            readers.setdefault(at, []).append(i)
    ready = [i for i, count in waits.items() if count == 0]
    order: list[int] = []
    while ready:
        i = heapq.heappop(ready)
        order.append(i)
        for reader in readers.get(i, ()):
            waits[reader] -= 1
            if waits[reader] == 0:
                heapq.heappush(ready, reader)
    if len(order) < len(graph.node):
        raise CorruptFileError(f"{len(graph.node) - len(order)} nodes of the graph read each other in a circle")
    return order


def _reads(node: onnx.NodeProto) -> tuple[str, ...]:
    """Names that a node reads, those captured by its sub-graphs included, each once."""
    names = dict.fromkeys(v for v in node.input if v)
    for attribute in node.attribute:
        for inner in (*([attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else ()), *attribute.graphs):
            names.update(dict.fromkeys(_captures(inner)))
    return tuple(names)


def _captures(graph: onnx.GraphProto) -> tuple[str, ...]:
    """Names that a sub-graph reads from outside."""
    own = (
        {i.name for i in graph.input} | {t.name for t in graph.initializer} | {o for n in graph.node for o in n.output}
    )
    reads = [v for n in graph.node for v in _reads(n)] + [o.name for o in graph.output]
    return tuple(dict.fromkeys(v for v in reads if v and v not in own))


def _sparse_bytes(tensor: onnx.SparseTensorProto) -> int:
    return tensor_bytes(tensor.values.data_type, tensor.values.dims) + 8 * len(tensor.indices.dims)
