"""Laws of cutting, on generated graphs and on real ones: shards one after another equal the whole.

Nothing is fused here, so that no bit may change; for the engine as it serves see tests/node/test_cuts_as_served.py.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from shoal.model.frontier import Block, blocks, shard
from shoal.model.graph import read_graph

Array = NDArray[np.generic]
Arrays = dict[str, Array]
WIDTH = 8


def noise(shape: Sequence[int], seed: int) -> Array:
    """Numbers in [-1, 1) without visible order."""
    count = int(np.prod(shape))
    return (np.sin(np.arange(count) * 12.9898 + seed) * 43758.5453 % 2 - 1).reshape(tuple(shape)).astype(np.float32)


def run(model: onnx.ModelProto, feeds: Arrays) -> Arrays:
    """Outputs of the model in the engine, its optimisations off."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    wanted = {i.name for i in session.get_inputs()}
    return dict(zip(names, session.run(names, {k: v for k, v in feeds.items() if k in wanted}), strict=True))


def run_chain(
    model: onnx.ModelProto, chain: Sequence[Block], cuts: Sequence[int], feeds: Arrays, steps: Arrays
) -> Arrays:
    """Each shard gets the outputs of the one before, and the per-step inputs; nothing else."""
    given_outputs: Arrays = {}
    carried = feeds
    for start, stop in zip([0, *cuts], [*cuts, len(chain)], strict=True):
        part = shard(model, chain, start, stop)
        onnx.checker.check_model(part)
        outputs = run(part, {**carried, **steps})
        carried = {b.name: outputs[b.name] for b in chain[stop - 1].outputs}
        given_outputs |= {k: v for k, v in outputs.items() if k.startswith("present.")}
    return {**carried, **given_outputs}


def assert_same(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def assert_tiles(model: onnx.ModelProto, chain: Sequence[Block]) -> None:
    """Blocks tile the nodes, boundaries meet, every weight that is read belongs to a block, work is conserved."""
    graph = read_graph(model)
    assert [b.index for b in chain] == list(range(len(chain)))
    assert chain[0].node_start == 0
    assert chain[-1].node_stop == len(graph.nodes)
    for left, right in pairwise(chain):
        assert left.node_stop == right.node_start
        assert left.outputs == right.inputs
    held = {t.name for b in chain for t in b.tensors}
    assert held == {t.name for t in model.graph.initializer} & {v for n in graph.nodes for v in n.inputs}
    assert sum(b.flops_per_token for b in chain) == sum(n.flops for n in graph.nodes)


class Dag:
    """A random graph under construction: float values [1, T, WIDTH], a mask that every layer may use, tied weights."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[TensorProto] = []
        self.values = ["x"]

    def add(self, op: str, inputs: list[str], **attributes: object) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        array = noise(shape, self.seed + len(self.weights)) * np.float32(0.7)
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def model(self, outputs: Sequence[str]) -> onnx.ModelProto:
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "dag",
            [info("x", TensorProto.FLOAT, [1, "T", WIDTH]), info("mask", TensorProto.INT64, [1, "T"])],
            [info(o, TensorProto.FLOAT, [1, "T", WIDTH]) for o in outputs],
            self.weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@st.composite
def dags(draw: st.DrawFn) -> onnx.ModelProto:
    """Products, sums over arbitrary skips, masked values, dequantised weights, several outputs."""
    dag = Dag(draw(st.integers(0, 1000)))
    mask = dag.add("Unsqueeze", [dag.add("Cast", ["mask"], to=TensorProto.FLOAT), "last"])
    dag.weights.append(numpy_helper.from_array(np.array([-1]), "last"))
    matrices: list[str] = []
    for _ in range(draw(st.integers(5, 16))):
        operand = draw(st.sampled_from(dag.values[-3:]))
        match draw(st.sampled_from(["product", "product", "tied", "dequantised", "sum", "mask", "mask", "relu"])):
            case "product":
                matrices.append(dag.weight(WIDTH, WIDTH))
                value = dag.add("MatMul", [operand, matrices[-1]])
            case "tied" if matrices:
                value = dag.add("MatMul", [operand, draw(st.sampled_from(matrices))])
            case "dequantised":
                matrices.append(dag.add("Mul", [dag.add("Neg", [dag.weight(WIDTH, WIDTH)]), dag.weight(1)]))
                value = dag.add("MatMul", [operand, matrices[-1]])
            case "sum":
                value = dag.add("Add", [operand, draw(st.sampled_from(dag.values))])
            case "mask":
                value = dag.add("Mul", [operand, mask])
            case _:
                value = dag.add("Relu", [operand])
        dag.values.append(value)
    early = draw(st.sampled_from(dag.values[1:]))
    return dag.model(list(dict.fromkeys([early, dag.values[-1]])))


@settings(max_examples=60)
@given(dags(), st.data())
def test_any_cuts_of_any_graph_change_no_bit(model: onnx.ModelProto, data: st.DataObject) -> None:
    chain = blocks(model)
    feeds: Arrays = {"x": noise((1, 5, WIDTH), 0), "mask": np.array([[1, 1, 0, 1, 0]])}
    inner = range(1, len(chain))
    cuts = sorted(data.draw(st.sets(st.sampled_from(inner), min_size=1))) if inner else []

    assert_tiles(model, chain)
    assert_same(run_chain(model, chain, cuts, feeds, {}), run(model, feeds))


def test_masks_and_dequantised_weights_are_made_again_in_every_shard() -> None:
    dag = Dag(7)
    mask = dag.add("Unsqueeze", [dag.add("Cast", ["mask"], to=TensorProto.FLOAT), "last"])
    dag.weights.append(numpy_helper.from_array(np.array([-1]), "last"))
    tied = dag.add("Mul", [dag.add("Neg", [dag.weight(WIDTH, WIDTH)]), dag.weight(1)])
    value = "x"
    for _ in range(4):
        value = dag.add("Mul", [dag.add("MatMul", [value, tied]), mask])
    model = dag.model([value])
    feeds: Arrays = {"x": noise((1, 5, WIDTH), 0), "mask": np.array([[1, 1, 0, 1, 0]])}
    chain = blocks(model)

    assert [[i.name for i in b.inputs][1:] for b in chain] == [["mask"]] * 4
    assert [len(b.tensors) for b in chain] == [3] * 4
    assert_same(run_chain(model, chain, [1, 2, 3], feeds, {}), run(model, feeds))


@pytest.mark.parametrize("size", ["tiny", "small"])
@pytest.mark.parametrize(("part", "height"), [("det", 64), ("rec", 48)])
def test_an_image_model_in_blocks_of_one_gives_the_bits_of_the_whole(
    ocr_folder: Path, size: str, part: str, height: int
) -> None:
    model = onnx.load(ocr_folder / size / part / f"{part}.onnx")
    feeds: Arrays = {"x": noise((1, 3, height, 96), 1)}

    assert_blocks_of_one(model, feeds, at_least=10)


def test_an_int8_encoder_in_blocks_of_one_gives_the_bits_of_the_whole(minilm_int8: Path) -> None:
    model = onnx.load(minilm_int8)
    ids = np.array([[101, 7592, 2088, 102, 0, 0], [101, 2023, 2003, 1037, 3231, 102]])
    feeds: Arrays = {"input_ids": ids, "attention_mask": np.sign(ids), "token_type_ids": np.zeros_like(ids)}

    assert_blocks_of_one(model, feeds, at_least=12)
    streams = [[o.name for o in b.outputs if o.dtype == "float32"] for b in blocks(model)[1:-1]]
    assert streams == [["layer_norm"], *([f"layer_norm_{n}"] for n in range(1, 12))]


def assert_blocks_of_one(model: onnx.ModelProto, feeds: Arrays, *, at_least: int) -> None:
    chain = blocks(model)

    assert len(chain) >= at_least
    assert_tiles(model, chain)
    assert_same(run_chain(model, chain, list(range(1, len(chain))), feeds, {}), run(model, feeds))


@pytest.mark.parametrize("positive", [True, False])
def test_a_branch_that_reads_from_outside_runs_in_any_shard(positive: bool) -> None:
    info = helper.make_tensor_value_info
    out = [info("r", TensorProto.FLOAT, None)]
    then = helper.make_graph([helper.make_node("MatMul", ["a", "w1"], ["r"])], "then", [], out)
    other = helper.make_graph([helper.make_node("Add", ["x", "a"], ["r"])], "else", [], out)
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"]),
        helper.make_node("MatMul", ["a", "w1"], ["b"]),
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Greater", ["s", "zero"], ["c"]),
        helper.make_node("If", ["c"], ["d"], then_branch=then, else_branch=other),
        helper.make_node("Add", ["b", "d"], ["e"]),
        helper.make_node("MatMul", ["e", "w2"], ["y"]),
    ]
    weights = [numpy_helper.from_array(noise((WIDTH, WIDTH), i), f"w{i}") for i in range(3)]
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", TensorProto.FLOAT, [1, "T", WIDTH])],
        [info("y", TensorProto.FLOAT, [1, "T", WIDTH])],
        [*weights, numpy_helper.from_array(np.float32(0), "zero")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    feeds: Arrays = {"x": np.abs(noise((1, 3, WIDTH), 1)) * np.float32(1 if positive else -1)}
    chain = blocks(model)

    assert len(chain) >= 2
    assert_tiles(model, chain)
    assert_same(run_chain(model, chain, list(range(1, len(chain))), feeds, {}), run(model, feeds))
