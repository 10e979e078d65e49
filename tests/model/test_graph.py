"""What a graph's nodes, values and work are."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from shoal.errors import CorruptFileError
from shoal.model.graph import read_graph
from shoal.model.shapes import CONTEXT, SAMPLE_AXIS, TOKENS, value_types


def model_of(text: str) -> onnx.ModelProto:
    """Parse; values declared without contents become weights stored elsewhere, `__` in a name becomes a dot."""
    model = parser.parse_model(f'<ir_version: 9, opset_import: ["" : 17]>\n{text}')
    graph = model.graph
    made = {o for n in graph.node for o in n.output}
    for value in (v for v in graph.value_info if v.name not in made):
        kind = value.type.tensor_type
        dims = [d.dim_value for d in kind.shape.dim]
        graph.initializer.add(name=value.name, data_type=kind.elem_type, dims=dims, data_location=TensorProto.EXTERNAL)
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        value.name = value.name.replace("__", ".")
    for node in graph.node:
        node.input[:] = [v.replace("__", ".") for v in node.input]
        node.output[:] = [v.replace("__", ".") for v in node.output]
    return model


def operators(model: onnx.ModelProto) -> list[str]:
    return [model.graph.node[n.source].op_type for n in read_graph(model).nodes]


def test_a_dequantised_weight_stands_before_its_reader() -> None:
    model = model_of("""
        g (float[1, T, 4] x) => (float[1, T, 4] y) <int8[4, 4] q, float[1] s> {
          f = Cast <to = 1> (q)
          w = Mul (f, s)
          a = Relu (x)
          y = MatMul (a, w)
        }""")

    assert operators(model) == ["Relu", "Cast", "Mul", "MatMul"]


def test_a_mask_is_derived_again_instead_of_sent() -> None:
    model = model_of("""
        g (float[1, T, 4] x, int64[1, T] mask) => (float[1, T, 4] y) <float[4, 4] w, int64[1] last = {2}> {
          m = Cast <to = 1> (mask)
          m3 = Unsqueeze (m, last)
          a = MatMul (x, w)
          b = Mul (a, m3)
          c = MatMul (b, w)
          y = Mul (c, m3)
        }""")

    graph = read_graph(model)

    at_end = graph.carried[-1]
    assert at_end == {"c", "mask"}
    assert [n.spine for n in graph.nodes] == [True, False, False, True, True, True]


def test_token_ids_are_never_a_source_to_derive_from() -> None:
    model = model_of("""
        g (int64[1, T] input_ids) => (float[1, T, 4] y) <float[16, 4] e, float[4, 4] w> {
          x = Gather (e, input_ids)
          a = MatMul (x, w)
          y = Add (x, a)
        }""")

    assert read_graph(model).carried[-1] == {"x", "a"}


def test_per_step_inputs_are_only_those_of_a_model_with_a_cache() -> None:
    plain = model_of("g (float[1, T, 4] x, int64[1, T] position_ids) => (float[1, T, 4] y) { y = Relu (x) }")
    cached = model_of("""
        g (float[1, T, 4] x, int64[1, T] position_ids, float[1, 2, P, 4] past_key_values__0__key)
        => (float[1, T, 4] y, float[1, 2, P, 4] present__0__key) {
          y = Relu (x)
          present__0__key = Identity (past_key_values__0__key)
        }""")

    assert read_graph(plain).data_inputs == ("x", "position_ids")
    assert read_graph(cached).data_inputs == ("x",)
    assert read_graph(cached).step_inputs == ("position_ids", "past_key_values.0.key")
    assert read_graph(cached).outputs == ("y",)


def test_random_operators_run_once() -> None:
    model = model_of("""
        g (float[1, T, 4] x) => (float[1, T, 4] y) {
          r = RandomNormal <shape = [4]> ()
          a = Add (x, r)
          y = Mul (a, r)
        }""")

    graph = read_graph(model)

    assert all(n.spine for n in graph.nodes)
    assert graph.carried[-1] == {"a", "r"}


def test_captures_of_a_branch_are_inputs_of_its_node() -> None:
    branch = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["r"])],
        "b",
        [],
        [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["r"])],
        "b",
        [],
        [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)],
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=other)],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T"]),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T"])],
        [numpy_helper.from_array(np.ones(1, np.float32), "w")],
    )

    (node,) = read_graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])).nodes

    assert node.inputs == ("c", "x", "w")
    assert node.spine


def test_nodes_in_a_wrong_order_are_sorted_and_dead_ones_left_out() -> None:
    model = model_of("""
        g (float[1, T, 4] x) => (float[1, T, 4] y) {
          a = Relu (x)
          dead = Exp (a)
          y = Neg (a)
        }""")
    nodes = [model.graph.node[2], model.graph.node[1], model.graph.node[0]]
    shuffled = onnx.ModelProto()
    shuffled.CopyFrom(model)
    del shuffled.graph.node[:]
    shuffled.graph.node.extend(nodes)

    assert operators(shuffled) == ["Relu", "Neg"]


def test_a_value_that_nothing_makes_is_named() -> None:
    model = model_of("g (float[1, T, 4] x) => (float[1, T, 4] y) { y = Add (x, ghost) }")

    with pytest.raises(CorruptFileError, match="ghost"):
        read_graph(model)


def test_a_circle_is_an_error() -> None:
    model = model_of("g (float[1, 4] x) => (float[1, 4] y) { a = Add (x, b) b = Relu (a) y = Relu (b) }")

    with pytest.raises(CorruptFileError, match="circle"):
        read_graph(model)


def test_work_of_products_and_convolutions_is_two_per_multiplication() -> None:
    product = model_of(
        "g (int64[1, T] input_ids, float[1, T, 4] x) => (float[1, T, 8] y) <float[4, 8] w> { y = MatMul (x, w) }"
    )
    convolution = model_of(
        "g (float[n, 3, h, 32] x) => (float[n, 8, h, 32] y) <float[8, 3, 3, 3] w> { y = Conv <pads = [1, 1, 1, 1]> (x, w) }"
    )

    assert [n.flops for n in read_graph(product).nodes] == [2 * 4 * 8]
    assert [n.flops for n in read_graph(convolution).nodes] == [2 * (8 * SAMPLE_AXIS * 32) * 27]


def test_a_binding_sizes_dynamic_axes_by_name() -> None:
    model = model_of("g (float[n, 3, h, w] x) => (float[n, 3, h, w] y) { y = Relu (x) }")

    known = value_types(model, {"h": 32, "w": 64})["y"]

    assert known.dims == (1, 3, 32, 64)
    assert known.shape == ("n", 3, "h", "w")
    assert known.bytes_fixed == 3 * 32 * 64 * 4


def test_bytes_per_token_are_the_slope() -> None:
    model = model_of("g (int64[1, T] input_ids) => (float[1, T, 4] y) <float[16, 4] e> { y = Gather (e, input_ids) }")

    known = value_types(model)["y"]

    assert (known.bytes_per_token, known.bytes_fixed, known.dims) == (16, 0, (1, TOKENS, 4))


@pytest.mark.parametrize("opset", [11, 17])
def test_shape_arithmetic_that_exporters_write_is_followed(opset: int) -> None:
    model = model_of("""
        g (float[n, c, h, w] x) => (float[n, m, k] y)
        <int64[1] zero = {0}, int64[1] one = {1}, int64[1] rest = {-1}> {
          s = Shape (x)
          n = Slice (s, zero, one)
          t = Concat <axis = 0> (n, rest, one)
          y = Reshape (x, t)
        }""")

    model.opset_import[0].version = opset

    known = value_types(model, {"c": 2, "h": 3, "w": 4})["y"]

    assert known.dims == (1, 24, 1)


def test_operators_of_the_engine_have_stand_ins() -> None:
    """A folder that was lowered elsewhere can still be priced and cut."""
    nodes = [
        helper.make_node("SimplifiedLayerNormalization", ["x", "g"], ["h"]),
        helper.make_node(
            "MatMulNBits", ["h", "q", "d"], ["qkv"], domain="com.microsoft", K=32, N=64, bits=4, block_size=32
        ),
        helper.make_node(
            "GroupQueryAttention",
            ["qkv", "", "", "past_key_values.0.key", "past_key_values.0.value", "seqlens_k", "total_sequence_length"],
            ["a", "present.0.key", "present.0.value"],
            domain="com.microsoft",
            num_heads=4,
            kv_num_heads=2,
        ),
        helper.make_node(
            "SkipSimplifiedLayerNormalization", ["x", "a", "g"], ["n", "", "", "r"], domain="com.microsoft"
        ),
    ]
    info = helper.make_tensor_value_info
    cache = [1, 2, "P", 8]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            info("x", TensorProto.FLOAT, [1, "T", 32]),
            info("input_ids", TensorProto.INT64, [1, "T"]),
            info("past_key_values.0.key", TensorProto.FLOAT, cache),
            info("past_key_values.0.value", TensorProto.FLOAT, cache),
            info("seqlens_k", TensorProto.INT32, [1]),
            info("total_sequence_length", TensorProto.INT32, []),
        ],
        [info("n", TensorProto.FLOAT, None), info("r", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(np.ones(32, np.float32), "g"),
            numpy_helper.from_array(np.zeros((64, 1, 16), np.uint8), "q"),
            numpy_helper.from_array(np.ones((64, 1), np.float32), "d"),
        ],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]

    read = read_graph(helper.make_model(graph, opset_imports=opsets))

    assert [read.types[v].dims for v in ("h", "qkv", "a", "n", "r")] == [
        (1, TOKENS, 32),
        (1, TOKENS, 64),
        (1, TOKENS, 32),
        (1, TOKENS, 32),
        (1, TOKENS, 32),
    ]
    assert read.nodes[1].flops == 2 * 32 * 64
    assert read.nodes[2].flops == 4 * 32 * (CONTEXT + TOKENS)
