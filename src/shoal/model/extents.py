"""Shape arithmetic: integer values that follow from known shapes and constants.

Exported graphs compute the targets of `Reshape`, `Slice` and `Expand` with integer nodes that the ONNX inference follows
only in part.  Here they are evaluated, so that their results can be written into the graph as constants before the next
inference.  Only small integer tensors and the operators that exporters use for them; everything else stays unknown.
"""

from collections.abc import Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

Integers = NDArray[np.int64]
MAX_ELEMENTS = 64
_INTEGER_TYPES = frozenset({onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL})
_ARITHMETIC = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.floor_divide, "Mod": np.mod}
_ARITHMETIC |= {"Max": np.maximum, "Min": np.minimum, "Equal": np.equal, "Greater": np.greater, "Less": np.less}


def constants(graph: onnx.GraphProto) -> dict[str, Integers]:
    """Small integer initializers and `Constant` nodes."""
    tensors = {t.name: t for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            tensors[node.output[0]] = node.attribute[0].t
    return {
        name: numpy_helper.to_array(t).astype(np.int64)
        for name, t in tensors.items()
        if t.data_type in _INTEGER_TYPES and np.prod(t.dims, dtype=np.int64) <= MAX_ELEMENTS
    }


def evaluate(graph: onnx.GraphProto, known: dict[str, Integers], dims: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Add to *known* what follows from it and from the known *dims*; returns the names that are new."""
    new: set[str] = set()
    for node in graph.node:
        if len(node.output) != 1 or node.output[0] in known:
            continue
        value = _value(node, known, dims)
        if value is not None and value.size <= MAX_ELEMENTS:
            known[node.output[0]] = value
            new.add(node.output[0])
    return new


def _value(node: onnx.NodeProto, known: Mapping[str, Integers], dims: Mapping[str, tuple[int, ...]]) -> Integers | None:
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type in ("Shape", "Size"):
        shape = dims.get(node.input[0])
        if shape is None:
            return None
        whole = np.asarray(shape, np.int64)
        return whole[slice(attributes.get("start"), attributes.get("end"))] if node.op_type == "Shape" else whole.prod()
    if not node.input or any(v and v not in known for v in node.input):
        return None
    values = [known[v] if v else None for v in node.input]
    try:
        result = _moved(node.op_type, values, attributes)
    except (ValueError, IndexError, ZeroDivisionError):
        return None  # the engine will say so when it runs; here the extent merely stays unknown
    return None if result is None else np.asarray(result, np.int64)


def _moved(op: str, values: list[Integers | None], attributes: Mapping[str, object]) -> object:
    first = values[0]
    assert first is not None
    given = [v for v in values if v is not None]
    axes = given[1] if len(given) > 1 else np.asarray(attributes.get("axes", ()), np.int64)
    match op:
        case "Identity" | "Cast":
            return first if attributes.get("to", onnx.TensorProto.INT64) in _INTEGER_TYPES else None
        case "Concat":
            return np.concatenate(given)
        case "Gather":
            return np.take(first, given[1], axis=int(str(attributes.get("axis", 0))))
        case "Squeeze":
            return np.squeeze(first, tuple(int(a) for a in axes.ravel()) or None)
        case "Unsqueeze":
            return np.expand_dims(first, tuple(int(a) for a in axes.ravel()))
        case "Slice" if first.ndim == 1 and len(given) >= 3:
            step = int(given[4].ravel()[0]) if len(given) > 4 else 1
            return first[int(given[1].ravel()[0]) : int(given[2].ravel()[0]) : step]
        case "Reshape":
            return first.reshape([int(d) for d in given[1].ravel()])
        case "Where":
            return np.where(given[0], given[1], given[2])
        case name if name in _ARITHMETIC and len(given) == 2:
            return _ARITHMETIC[name](given[0], given[1])
        case _:
            return None
