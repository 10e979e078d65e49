"""Floating-point operations of a node, from shapes: what a block costs relative to another before anything is measured.

A multiply-add counts two.  Elementwise and moving operators count one per output element.
"""

import math
from collections.abc import Mapping

import onnx

from shoal.model.shapes import CONTEXT, ValueType

_MOVES = frozenset(
    {
        "Identity",
        "Reshape",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Shape",
        "Size",
        "Constant",
        "ConstantOfShape",
        "Slice",
    }
    | {"Concat", "Split", "Gather", "GatherND", "GatherElements", "Flatten", "Expand", "Cast", "Pad", "Range", "Tile"}
)
_PRODUCTS = frozenset(
    {"MatMul", "MatMulInteger", "QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "FusedMatMul"}
)
_CONVOLUTIONS = frozenset({"Conv", "ConvInteger", "QLinearConv", "FusedConv"})
_ATTENTIONS = frozenset({"Attention", "GroupQueryAttention", "MultiHeadAttention"})

Dims = tuple[int, ...]


def node_flops(node: onnx.NodeProto, types: Mapping[str, ValueType], weights: Mapping[str, Dims]) -> int:
    """Operations of *node* in the nominal step; 0 where its shapes are unknown."""
    dims = [weights.get(name) or _dims(types, name) for name in node.input]
    out = next((d for name in node.output if (d := _dims(types, name)) is not None), None)
    if out is None or node.op_type in _MOVES:
        return 0
    rows = math.prod(out)
    if node.op_type in _PRODUCTS:
        first = dims[0]
        return 2 * rows * first[-1] if first else 0
    if node.op_type == "Gemm":
        inner = dims[0][0 if _int(node, "transA") else 1] if dims[0] else 0
        return 2 * rows * inner
    if node.op_type in _CONVOLUTIONS:
        kernel = dims[3] if node.op_type == "QLinearConv" else dims[1]
        return 2 * rows * math.prod(kernel[1:]) if kernel else 0
    if node.op_type == "ConvTranspose":
        return 2 * math.prod(dims[0]) * math.prod(dims[1][1:]) if dims[0] and dims[1] else 0
    if node.op_type in _ATTENTIONS:
        return _attention(node, dims, rows)
    return _foreign(node, types, weights, rows)


def _attention(node: onnx.NodeProto, dims: list[Dims | None], rows: int) -> int:
    """Scores and their product with the values: 4 operations per output element and attended position."""
    keys = dims[1] if len(dims) > 1 else None
    past = dims[4] if node.op_type == "Attention" and len(dims) > 4 else None
    if node.op_type == "GroupQueryAttention":
        return 4 * rows * (CONTEXT + (dims[0][1] if dims[0] else 0))
    attended = (keys[-2] if keys else 0) + (past[-2] if past else 0)
    return 4 * rows * attended


def _foreign(node: onnx.NodeProto, types: Mapping[str, ValueType], weights: Mapping[str, Dims], rows: int) -> int:
    """Block-quantised products and model-local functions: a product where activations meet a matrix of weights."""
    inner = _int(node, "K")
    if inner:
        return 2 * rows * inner
    if node.domain in ("", "ai.onnx", "com.microsoft"):
        return rows
    first = types.get(node.input[0]) if node.input else None
    if first is None or not first.dims or "float" not in first.dtype:
        return 0  # rows looked up by integer ids
    if "Attention" in node.op_type:
        return 4 * rows * (CONTEXT + first.dims[1])
    matrix = any(len(weights.get(name, ())) >= 2 for name in node.input)
    return 2 * rows * first.dims[-1] if matrix else rows


def _dims(types: Mapping[str, ValueType], name: str) -> Dims | None:
    known = types.get(name)
    return known.dims if known else None


def _int(node: onnx.NodeProto, name: str) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), 0)
