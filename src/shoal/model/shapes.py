"""What is known about every value of a graph before it runs: dtype, symbolic shape, bytes, elements.

Problem: exported graphs carry symbolic dimensions, the ONNX inference stops at convolutions over symbols and at the
engine's own operators, and a cut must be priced in bytes.  Rule: infer three times.  Once as written, for the names of
the dynamic axes; twice with all inputs bound to numbers (steps of `TOKENS` and `2 * TOKENS` rows, or one sample), for
sizes; bytes per token are the slope between the two.  Operators that ONNX does not know are replaced by stand-ins of
the same output shape for the inference only.  Whatever stays unknown has `None` sizes, and is never cut.
Rejected: the engine's symbolic inference (a second algebra, imports the engine, slower than all three passes).
"""

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import onnx
from onnx import helper, numpy_helper, shape_inference

from shoal.model import extents, spec

TOKENS = 64
"""Rows of the nominal step of a sequence model."""
CONTEXT = 256
"""Cached positions before the nominal step."""
SAMPLE_AXIS = 640
"""A dynamic axis of a model without tokens, e.g. the height of an image (a multiple of 32 as detectors want it)."""

_ROUNDS = 64
"""Inferences at most: a chain of reshapes that each wait for the one before needs one per link."""

Dim = int | str
_Types = dict[str, tuple[int, tuple[Dim, ...] | None]]
_SAME_SHAPE = frozenset(
    {"SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "SkipLayerNormalization", "FastGelu", "Gelu"}
    | {"BiasGelu", "QuickGelu", "RotaryEmbedding", "MultiHeadAttention", "GroupQueryAttention", "BiasSplitGelu"}
)
_FIRST_INPUT_OUTPUTS = {"SkipSimplifiedLayerNormalization": (0, 3), "SkipLayerNormalization": (0, 3)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueType:
    """A tensor's type; `shape` is None when even the rank is unknown, sizes are None when a dimension is.

    Its bytes are `bytes_fixed + bytes_per_token * T`; `dims` are the numbers of the nominal step.
    """

    dtype: str
    shape: tuple[Dim, ...] | None
    dims: tuple[int, ...] | None
    bytes_per_token: int | None
    bytes_fixed: int | None

    @property
    def elements(self) -> int | None:
        """Elements in the nominal step."""
        return None if self.dims is None else math.prod(self.dims)

    @property
    def nominal_bytes(self) -> int | None:
        """Bytes in the nominal step."""
        if self.bytes_fixed is None or self.bytes_per_token is None:
            return None
        return self.bytes_fixed + self.bytes_per_token * TOKENS


def dtype_name(elem_type: int) -> str:
    """Numpy's name of an ONNX element type ("unknown" for 0)."""
    special = {0: "unknown", onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.DOUBLE: "float64"}
    return special.get(elem_type) or onnx.TensorProto.DataType.Name(elem_type).lower()


def element_type(dtype: str) -> int:
    """ONNX element type of a name that `dtype_name` gave."""
    special = {"unknown": 0, "float32": onnx.TensorProto.FLOAT, "float64": onnx.TensorProto.DOUBLE}
    return special[dtype] if dtype in special else int(onnx.TensorProto.DataType.Value(dtype.upper()))


def tensor_bytes(elem_type: int, dims: Iterable[int]) -> int:
    """Bytes of a tensor; 4-bit types are packed two to a byte, 2-bit types four."""
    name = dtype_name(elem_type)
    bits = {"int4": 4, "uint4": 4, "float4e2m1": 4, "int2": 2, "uint2": 2, "string": 128, "bool": 8}.get(name)
    if bits is None:
        bits = 8 * int(helper.tensor_dtype_to_np_dtype(elem_type).itemsize)
    return -(-math.prod(dims) * bits // 8)


def value_types(model: onnx.ModelProto, binding: Mapping[str, int] | None = None) -> dict[str, ValueType]:
    """Types of all values, initializers apart; *binding* fixes dynamic axes by name for the sizes."""
    plain = _with_stand_ins(model)
    symbolic = _infer(plain)
    one = _infer_sizes(_bound(plain, symbolic, TOKENS, binding or {}))
    two = _infer_sizes(_bound(plain, symbolic, 2 * TOKENS, binding or {}))
    return {name: _merged(name, symbolic.get(name), one.get(name), two.get(name)) for name in {**symbolic, **one}}


def weight_type(tensor: onnx.TensorProto) -> ValueType:
    """Type of an initializer."""
    dims = tuple(tensor.dims)
    size_bytes = tensor_bytes(tensor.data_type, dims)
    return ValueType(
        dtype=dtype_name(tensor.data_type), shape=dims, dims=dims, bytes_per_token=0, bytes_fixed=size_bytes
    )


def is_sequence(model: onnx.ModelProto) -> bool:
    """Whether the model reads token ids."""
    return any(i.name == spec.INPUT_IDS for i in model.graph.input)


def has_cache(model: onnx.ModelProto) -> bool:
    """Whether the model carries a key-value cache from step to step."""
    return any(i.name.startswith(spec.PAST_PREFIX) for i in model.graph.input)


def _merged(
    name: str,
    symbolic: tuple[int, tuple[Dim, ...] | None] | None,
    one: tuple[int, tuple[Dim, ...] | None] | None,
    two: tuple[int, tuple[Dim, ...] | None] | None,
) -> ValueType:
    first, second = _numbers(one), _numbers(two)
    elem_type = next((t[0] for t in (symbolic, one, two) if t and t[0]), 0)
    shape = symbolic[1] if symbolic else None
    if (shape is None or any(str(d).startswith("unk__") for d in shape)) and first and second:
        names = shape or tuple(f"{name}.{axis}" for axis in range(len(first)))
        same = [a if a == b else n for a, b, n in zip(first, second, names, strict=True)]
        shape = tuple(
            d if isinstance(d, int) else f"{name}.{i}" if d.startswith("unk__") else d for i, d in enumerate(same)
        )
    if first is None or second is None or elem_type == 0:
        return ValueType(dtype=dtype_name(elem_type), shape=shape, dims=first, bytes_per_token=None, bytes_fixed=None)
    low, high = tensor_bytes(elem_type, first), tensor_bytes(elem_type, second)
    slope = (high - low) // TOKENS
    return ValueType(
        dtype=dtype_name(elem_type), shape=shape, dims=first, bytes_per_token=slope, bytes_fixed=low - slope * TOKENS
    )


def _numbers(entry: tuple[int, tuple[Dim, ...] | None] | None) -> tuple[int, ...] | None:
    if entry is None or entry[1] is None:
        return None
    numbers = tuple(d for d in entry[1] if isinstance(d, int))
    return numbers if len(numbers) == len(entry[1]) else None


def _infer(model: onnx.ModelProto) -> _Types:
    """Types that the ONNX inference finds; what it cannot find is absent, what it refuses leaves the declared ones."""
    with suppress(shape_inference.InferenceError, RuntimeError, ValueError):  # a graph that runs may still trip it
        model = shape_inference.infer_shapes(model, data_prop=True)
    graph = model.graph
    found: _Types = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        if tensor.elem_type or value.name not in found:
            found[value.name] = (tensor.elem_type, _shape(tensor))
    return found


def _infer_sizes(model: onnx.ModelProto) -> _Types:
    """The same with shape arithmetic in between, until nothing more becomes known."""
    graph = model.graph
    known = extents.constants(graph)
    found = _infer(model)
    for _ in range(_ROUNDS):
        if all(_numbers(found.get(o)) is not None for n in graph.node for o in n.output if o):
            break
        dims = {name: d for name, entry in found.items() if (d := _numbers(entry)) is not None}
        new = extents.evaluate(graph, known, dims | {t.name: tuple(t.dims) for t in graph.initializer})
        if not new:
            break
        for node in graph.node:
            if node.output and node.output[0] in new:
                value = numpy_helper.from_array(known[node.output[0]])
                node.CopyFrom(helper.make_node("Constant", [], [node.output[0]], value=value))
        found = {**_infer(model), **{n: e for n, e in found.items() if e[0] and _numbers(e)}}
    return found


def _shape(tensor: onnx.TypeProto.Tensor) -> tuple[Dim, ...] | None:
    if not tensor.HasField("shape"):
        return None
    return tuple(
        d.dim_value if d.HasField("dim_value") else d.dim_param or f"unk__{axis}"
        for axis, d in enumerate(tensor.shape.dim)
    )


def _bound(model: onnx.ModelProto, symbolic: _Types, tokens: int, binding: Mapping[str, int]) -> onnx.ModelProto:
    """A copy whose inputs have numbers only; of *symbolic* types it keeps those whose axes are axes of inputs."""
    bound = onnx.ModelProto()
    bound.CopyFrom(model)
    sequence, cache = is_sequence(model), has_cache(model)
    known = dict(binding)
    for value in bound.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value"):
                size = (
                    _axis_size(value.name, axis, tokens, cache=cache) if sequence else (1 if axis == 0 else SAMPLE_AXIS)
                )
                symbol = dim.dim_param
                dim.dim_value = binding.get(symbol, size)
                if symbol:
                    known.setdefault(symbol, dim.dim_value)
    for value in bound.graph.output:
        value.type.tensor_type.ClearField("shape")
    del bound.graph.value_info[:]
    ends = {v.name for v in (*bound.graph.input, *bound.graph.output)}
    for name, (elem_type, shape) in symbolic.items():
        numbers = [known.get(d) if isinstance(d, str) else d for d in shape or ()]
        if shape is not None and elem_type and name not in ends and None not in numbers:
            bound.graph.value_info.append(helper.make_tensor_value_info(name, elem_type, numbers))
    return bound


def _axis_size(name: str, axis: int, tokens: int, *, cache: bool) -> int:
    """A dynamic axis of an input of a sequence model, by the naming convention of `spec`."""
    if name.startswith(spec.PAST_PREFIX):
        return {0: 1, 2: CONTEXT}.get(axis, tokens)
    if name in (spec.LOGIT_ROWS, spec.SEQLENS_K):
        return tokens if name == spec.LOGIT_ROWS else 1
    if name == spec.ATTENTION_MASK and cache and axis == 1:
        return CONTEXT + tokens
    return 1 if axis == 0 else tokens


def _with_stand_ins(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that the ONNX inference understands: weights without data, foreign operators replaced."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    weights = {t.name: t for t in model.graph.initializer}
    past = {i.name: i for i in model.graph.input}
    nodes: list[onnx.NodeProto] = []
    for node in copy.graph.node:
        nodes.extend(_stand_in(node, weights, past, copy.graph))
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    for tensor in copy.graph.initializer:
        if len(tensor.raw_data) > 1024:  # shapes and scalars are read by the inference, weights are not
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            del tensor.external_data[:]
            tensor.external_data.add(key="location", value=tensor.name)
    return copy


def _stand_in(
    node: onnx.NodeProto,
    weights: Mapping[str, onnx.TensorProto],
    inputs: Mapping[str, onnx.ValueInfoProto],
    graph: onnx.GraphProto,
) -> list[onnx.NodeProto]:
    if node.domain != "com.microsoft" and node.op_type != "SimplifiedLayerNormalization":
        return [node]
    attributes = {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT}
    source, out = (node.input[1] if node.op_type == "GatherBlockQuantized" else node.input[0]), node.output[0]
    table = f"{out}.stand_in"
    match node.op_type:
        case "MatMulNBits":
            scale = weights[node.input[2]].data_type if node.input[2] in weights else onnx.TensorProto.FLOAT
            width = (attributes["K"], attributes["N"])
        case "GatherBlockQuantized":
            scales = weights[node.input[2]]
            scale, width = scales.data_type, (scales.dims[0], scales.dims[1] * attributes.get("block_size", 128))
            graph.input.append(helper.make_tensor_value_info(table, scale, width))
            return [helper.make_node("Gather", [table, source], [out])]
        case "GroupQueryAttention" if not node.input[1]:
            cache = inputs[node.input[3]].type.tensor_type
            heads, shared, size = attributes["num_heads"], attributes["kv_num_heads"], cache.shape.dim[3].dim_value
            scale, width = cache.elem_type, ((heads + 2 * shared) * size, heads * size)
        case name if name in _SAME_SHAPE:
            positions = _FIRST_INPUT_OUTPUTS.get(name, (0,))
            outs = [node.output[i] for i in positions if i < len(node.output) and node.output[i]]
            return [helper.make_node("Identity", [source], [o]) for o in outs]
        case _:
            return [node]
    graph.input.append(helper.make_tensor_value_info(table, scale, width))
    return [helper.make_node("MatMul", [source, table], [out])]
