"""A model as a chain of blocks, and the subgraph of a range of them.

Contract of the chain: the outputs of the shard [a, b) are exactly the boundary inputs of the shard [b, c), by name, so
running shards one after another needs no book-keeping: what a later shard needs of an earlier one, or of the request's
own tensors (a mask), travels through.  Apart from them a shard takes the *per-step* inputs of `spec` (positions,
lengths, mask, caches), which each session of a model with a cache makes by itself, and gives the `present.*` of its layers.
Which values travel at all is decided in `graph`, where to cut in `cuts`.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

import msgspec
import onnx
from onnx import helper

from shoal.errors import InvalidRequestError, UnsupportedModelError
from shoal.model import spec
from shoal.model.cuts import Cut, frontiers
from shoal.model.graph import Graph, read_graph
from shoal.model.shapes import ValueType, element_type, tensor_bytes

_LAYER = re.compile(r".*?\.(\d+)\.")


class Boundary(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor that crosses a cut.  `shape` mixes numbers and names of dynamic axes.

    Its size is `bytes_fixed + bytes_per_token * T` for a step of T rows (sequence models), or `bytes_fixed` per sample
    (at `shapes.SAMPLE_AXIS` for each dynamic axis that no binding gives).
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    bytes_per_token: int
    bytes_fixed: int


class BlockTensor(msgspec.Struct, frozen=True, kw_only=True):
    """A weight of a block, as stored."""

    name: str
    size_bytes: int


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """The nodes [`node_start`, `node_stop`) of the topological order, between two neighbouring frontiers.

    `kind` is a digest of the block's structure (operators, attributes, shapes and types, no names or values):
    blocks of equal kind cost the same on a device, so one trial stands for all.
    `kv_layers` are the layer numbers N of `past_key_values.N.*` whose cache this block owns.
    `inputs` of the first block and `outputs` of the last are the model's own, per-step ones and caches apart.
    `flops_per_token` is per row of a nominal step of a sequence model, else per sample.
    """

    index: int
    kind: str
    node_start: int
    node_stop: int
    tensors: tuple[BlockTensor, ...]
    inputs: tuple[Boundary, ...]
    outputs: tuple[Boundary, ...]
    flops_per_token: int
    kv_bytes_per_token: int
    kv_layers: tuple[int, ...] = ()

    @property
    def weights_bytes(self) -> int:
        """Bytes of the block's own weights (a tensor shared with another block counts in both)."""
        return sum(t.size_bytes for t in self.tensors)


def blocks(model: onnx.ModelProto, binding: Mapping[str, int] | None = None) -> tuple[Block, ...]:
    """Cut *model* at its frontiers; *binding* gives sizes to dynamic axes by name.

    Raises CorruptFileError when the graph does not hang together.
    """
    graph = read_graph(model, binding)
    first = Cut(position=0, crossing=graph.data_inputs)
    last = Cut(position=len(graph.nodes), crossing=graph.outputs)
    cuts = [first, *frontiers(graph, model), last]
    return tuple(_block(graph, model, i, a, b) for i, (a, b) in enumerate(pairwise(cuts)))


def shard(model: onnx.ModelProto, chain: Sequence[Block], start: int, stop: int) -> onnx.ModelProto:
    """The subgraph of the blocks [*start*, *stop*) of *chain*, which `blocks` gave for this *model*.

    Initializers keep their form (external stubs stay stubs).  Raises InvalidRequestError for a range or a chain that
    does not fit the model.
    """
    if not 0 <= start < stop <= len(chain):
        raise InvalidRequestError(f"blocks [{start}, {stop}) are not a range of the model's {len(chain)} blocks")
    graph = read_graph(model, sizes=False)
    if chain[-1].node_stop != len(graph.nodes):
        raise InvalidRequestError(
            f"the chain ends at node {chain[-1].node_stop}, the graph has {len(graph.nodes)} nodes",
            hint="import the model again",
        )
    first, last = chain[start], chain[stop - 1]
    wanted = [b.name for b in last.outputs]
    chosen = graph.needed(range(first.node_start, last.node_stop), wanted)
    nodes = [model.graph.node[graph.nodes[i].source] for i in chosen]
    reads = {v for i in chosen for v in graph.nodes[i].inputs}
    makes = {v for i in chosen for v in graph.nodes[i].outputs}
    declared = {v.name: v for v in (*model.graph.input, *model.graph.output)}
    steps = [declared[name] for name in graph.step_inputs if name in reads]
    presents = [v for v in model.graph.output if v.name.startswith(spec.PRESENT_PREFIX) and v.name in makes]
    part = helper.make_graph(
        nodes,
        f"{model.graph.name}[{start}:{stop}]",
        [*(_declared(b, declared) for b in first.inputs), *steps],
        [*(_declared(b, declared) for b in last.outputs), *presents],
    )
    keep = reads.union(wanted)
    part.initializer.extend(t for t in model.graph.initializer if t.name in keep)
    part.sparse_initializer.extend(t for t in model.graph.sparse_initializer if t.values.name in keep)
    return _packed(model, part)


def _declared(boundary: Boundary, declared: Mapping[str, onnx.ValueInfoProto]) -> onnx.ValueInfoProto:
    made = declared.get(boundary.name)
    return made or helper.make_tensor_value_info(boundary.name, element_type(boundary.dtype), boundary.shape)


def _packed(model: onnx.ModelProto, part: onnx.GraphProto) -> onnx.ModelProto:
    """A model of *part* with the functions and operator sets that it uses."""
    bodies = {(f.domain, f.name): f for f in model.functions}
    used = {(n.domain, n.op_type) for n in _all_nodes(part.node)}
    functions: dict[tuple[str, str], onnx.FunctionProto] = {}
    while missing := [key for key in bodies if key in used and key not in functions]:
        for key in missing:
            functions[key] = bodies[key]
            used |= {(n.domain, n.op_type) for n in _all_nodes(bodies[key].node)}
    domains = {_domain(domain) for domain, _ in used}
    made = onnx.ModelProto()
    made.CopyFrom(onnx.ModelProto(ir_version=model.ir_version, producer_name=model.producer_name))
    made.graph.CopyFrom(part)
    made.functions.extend(functions[key] for key in bodies if key in functions)
    made.opset_import.extend(o for o in model.opset_import if _domain(o.domain) in domains or _domain(o.domain) == "")
    made.metadata_props.extend(model.metadata_props)
    return made


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes and those of their sub-graphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else ()), *attribute.graphs):
                yield from _all_nodes(inner.node)


def _block(graph: Graph, model: onnx.ModelProto, index: int, begin: Cut, end: Cut) -> Block:
    positions = range(begin.position, end.position)
    chosen = graph.needed(positions, end.crossing)
    reads = dict.fromkeys(v for i in chosen for v in graph.nodes[i].inputs)
    reads.update(dict.fromkeys(end.crossing))
    caches = [v for v in reads if v.startswith(spec.PAST_PREFIX) and v in graph.step_inputs]
    return Block(
        index=index,
        kind=_kind(graph, model, chosen, begin, end),
        node_start=begin.position,
        node_stop=end.position,
        tensors=tuple(BlockTensor(name=v, size_bytes=graph.initializers[v]) for v in reads if v in graph.initializers),
        inputs=tuple(_boundary(graph, v) for v in begin.crossing),
        outputs=tuple(_boundary(graph, v) for v in end.crossing),
        flops_per_token=sum(graph.nodes[i].flops for i in positions),
        kv_bytes_per_token=sum(_cache_bytes(graph.types[v]) for v in caches),
        kv_layers=tuple(sorted({int(layer.group(1)) for v in caches if (layer := _LAYER.match(v))})),
    )


def _boundary(graph: Graph, name: str) -> Boundary:
    known = graph.types[name]
    return Boundary(
        name=name,
        dtype=known.dtype,
        shape=known.shape or (),
        bytes_per_token=known.bytes_per_token or 0,
        bytes_fixed=known.bytes_fixed or 0,
    )


def _cache_bytes(known: ValueType) -> int:
    """Bytes of one position of a cache tensor `[1, heads, P, width]`."""
    if known.dims is None or len(known.dims) != 4:
        raise UnsupportedModelError(f"a cache input has shape {known.shape}, wanted [1, heads, positions, width]")
    return tensor_bytes(element_type(known.dtype), (known.dims[1], known.dims[3]))


def _kind(graph: Graph, model: onnx.ModelProto, chosen: Iterable[int], begin: Cut, end: Cut) -> str:
    """Digest of the structure: values are numbered as they appear, weights count with type and shape only."""
    numbers: dict[str, int] = {}
    digest = hashlib.blake2b(digest_size=8)

    def describe(name: str) -> str:
        known = graph.types.get(name)
        size = (known.dtype, known.dims, known.bytes_per_token) if known else None
        return f"{numbers.setdefault(name, len(numbers))}{size}"

    digest.update(repr([describe(v) for v in begin.crossing]).encode())
    for i in chosen:
        node = model.graph.node[graph.nodes[i].source]
        digest.update(repr((node.domain, node.op_type, [describe(v) for v in node.input], len(node.output))).encode())
        for attribute in sorted(node.attribute, key=lambda a: a.name):
            value = (
                (attribute.t.data_type, tuple(attribute.t.dims))
                if attribute.HasField("t")
                else attribute.SerializeToString()
            )
            digest.update(repr((attribute.name, value)).encode())
        digest.update(repr([describe(v) for v in node.output]).encode())
    digest.update(repr([describe(v) for v in end.crossing]).encode())
    return digest.hexdigest()
