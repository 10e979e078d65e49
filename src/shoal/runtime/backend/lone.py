"""In how many rows at once this machine computes a row otherwise than beside one other: tried out, because no engine says so.

ONNX Runtime multiplies one row by weights of 4 or 8 bits with another kernel than several, and some kernels take rows in pairs and
give the last of an odd number to the one for single rows.  Which kernel sums in another order, and so ends in other last bits,
depends on the processor and on the format: blocks of 32 at 4 bits agree where there are integer dot products (AVX-512 VNNI) and
differ where there is AVX2 alone; with blocks of 64 it is the other way round for three rows (ONNX Runtime 1.31, 1 to 16 rows, one
thread and two).  Sizes of the matrix do not matter, nor do products of plain numbers differ.
Rows of a reproducible answer then get company until the number is one that agrees (`grouping.with_company`).
"""

from collections.abc import Iterator

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from shoal.runtime.request import Array

KERNEL = "MatMulNBits"
DOMAIN = "com.microsoft"
WIDTH = 64
"""Columns of the trial: enough sums that a different order shows in one of them."""

Kind = tuple[tuple[str, int], ...]


def odd_widths(graph: onnx.ModelProto, most: int) -> frozenset[int]:
    """Numbers of rows, *most* at most, of which a kernel of *graph* gives one other bits than beside one other row."""
    kinds = {_kind(node) for node in graph.graph.node if node.op_type == KERNEL and node.domain == DOMAIN}
    return frozenset(width for kind in kinds for width in _tried(dict(kind), most))


def _kind(node: onnx.NodeProto) -> Kind:
    named = {a.name: a.i for a in node.attribute}
    return tuple(
        (name, named.get(name, usual)) for name, usual in (("bits", 4), ("block_size", 32), ("accuracy_level", 0))
    )


def _tried(kind: dict[str, int], most: int) -> Iterator[int]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(_trial(kind).SerializeToString(), options, providers=["CPUExecutionProvider"])
    depth = _depth(kind)
    rows = np.sin(np.arange((most + 1) * depth, dtype=np.float32) * 1.7).reshape(most + 1, depth)

    def results(given: Array) -> Array:
        found: Array = session.run(None, {"x": given})[0]
        return found

    paired = np.stack([results(rows[at : at + 2])[0] for at in range(most)])
    yield from (width for width in range(1, most + 1) if not np.array_equal(results(rows[:width]), paired[:width]))


def _depth(kind: dict[str, int]) -> int:
    return 2 * max(kind["block_size"], 128)


def _trial(kind: dict[str, int]) -> onnx.ModelProto:
    depth = _depth(kind)
    blocks = depth // kind["block_size"]
    length = kind["block_size"] * kind["bits"] // 8
    weights: Array = (np.arange(WIDTH * blocks * length) * 37 % 251).astype(np.uint8).reshape(WIDTH, blocks, length)
    scales: Array = (0.02 + 0.01 * np.cos(np.arange(WIDTH * blocks))).astype(np.float32)
    node = helper.make_node(KERNEL, ["x", "w", "s"], ["y"], domain=DOMAIN)
    form = {**kind, "K": depth, "N": WIDTH}
    node.attribute.extend(helper.make_attribute(name, value) for name, value in form.items())
    graph = helper.make_graph(
        [node],
        "lone",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, depth])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, WIDTH])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(scales, "s")],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)], ir_version=10
    )
