"""Which numbers of rows change the bits of one: tried out on the engine."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from shoal.runtime.backend.lone import odd_widths

DEPTH, WIDTH, MOST = 512, 48, 6


def product(bits: int, block: int, accuracy: int) -> onnx.ModelProto:
    """A graph of one product by quantized weights."""
    source = np.random.Generator(np.random.PCG64(3))  # noqa: TID251 - test data, the decisions under test draw nothing
    blocks = DEPTH // block
    weights = source.integers(0, 256, (WIDTH, blocks, block * bits // 8), dtype=np.uint8)
    scales = source.uniform(0.01, 0.03, WIDTH * blocks).astype(np.float32)
    form = {"K": DEPTH, "N": WIDTH, "bits": bits, "block_size": block, "accuracy_level": accuracy}
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **form)
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, size]) for n, size in (("x", DEPTH), ("y", WIDTH))
    ]
    initializers = [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(scales, "s")]
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("accuracy", [0, 4])
def test_a_width_that_is_not_odd_gives_a_row_the_bits_that_it_has_beside_one_other(
    bits: int, block: int, accuracy: int
) -> None:
    model = product(bits, block, accuracy)
    odd = odd_widths(model, MOST)

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rows = np.random.Generator(np.random.PCG64(5)).normal(size=(MOST + 1, DEPTH)).astype(np.float32)  # noqa: TID251
    beside = np.stack([session.run(None, {"x": rows[at : at + 2]})[0][0] for at in range(MOST)])
    for width in set(range(1, MOST + 1)) - odd:
        assert np.array_equal(session.run(None, {"x": rows[:width]})[0], beside[:width]), width


def test_a_graph_without_such_products_has_no_odd_widths() -> None:
    node = helper.make_node("Identity", ["x"], ["y"])
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, 4]) for n in ("x", "y")]

    assert odd_widths(helper.make_model(helper.make_graph([node], "plain", ends[:1], ends[1:])), 8) == frozenset()
