"""From a model's graph and a measured chain to a cut through its operators."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from msgspec.structs import replace
from onnx import TensorProto, helper, numpy_helper

from shoal.errors import InvalidRequestError
from shoal.ids import NodeId
from shoal.model.frontier import Block, blocks
from shoal.model.graph import Graph, read_graph
from shoal.model.onnx import import_onnx
from shoal.plan.budget import StepBudget
from shoal.plan.build import shared_tensors
from shoal.plan.dag.build import question, split
from shoal.plan.dag.problem import GraphPlan
from shoal.plan.problem import BlockSpec, DeviceSpec, LinkSpec, Objective, Pin, Problem, RequestShape

BOARD, SERVER = NodeId("board"), NodeId("server")
ENOUGH = 10**9


class Net:
    """A network of pointwise convolutions over 8 x 8 pictures."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[TensorProto] = []

    def conv(self, value: str, inner: int, outer: int, *, weight: str = "") -> str:
        name = f"v{len(self.nodes)}"
        kernel = weight or f"w{len(self.nodes)}"
        if not weight:
            self.weights.append(numpy_helper.from_array(np.ones((outer, inner, 1, 1), np.float32), kernel))
        self.nodes.append(helper.make_node("Conv", [value, kernel], [name]))
        return name

    def add(self, op: str, *values: str, **attributes: object) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(values), [name], **attributes))
        return name

    def model(self, channels: int, result: str) -> onnx.ModelProto:
        ends = [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, channels, 8, 8]),
            helper.make_tensor_value_info(result, TensorProto.FLOAT, None),
        ]
        graph = helper.make_graph(self.nodes, "net", ends[:1], ends[1:], self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def branched() -> onnx.ModelProto:
    """A stem of 64 channels, two branches with a neck of 2, and 64 again; written branch by branch, as exporters do."""
    net = Net()
    stem = net.conv("x", 3, 64)
    wide = [net.conv(net.conv(stem, 64, 2), 2, 32) for _ in range(2)]
    joined = net.add("Concat", *wide, axis=1)
    return net.model(3, net.conv(net.add("Relu", joined), 64, 4))


def stated(chain: Sequence[Block], rate: float = 1e5, slowness: float = 20.0) -> Problem:
    """A slow board and a server; blocks take time by their arithmetic."""
    seconds = [block.flops_per_token / 1e7 for block in chain]
    return Problem(
        blocks=tuple(
            BlockSpec(
                name=f"block {block.index}",
                weights_bytes=block.weights_bytes,
                output_bytes_per_token=sum(boundary.bytes_per_token for boundary in block.outputs),
                output_bytes_fixed=sum(boundary.bytes_fixed for boundary in block.outputs),
            )
            for block in chain
        ),
        devices=tuple(
            DeviceSpec(
                node=node,
                memory_budget_bytes=10**9,
                decode_s=tuple(times * s for s in seconds),
                prefill_s=tuple(times * s for s in seconds),
            )
            for node, times in ((BOARD, slowness), (SERVER, 1.0))
        ),
        links=tuple(
            LinkSpec(source=a, target=b, latency_s=0.001, bytes_per_s=rate)
            for a, b in ((BOARD, SERVER), (SERVER, BOARD))
        ),
        shape=RequestShape(tokens_in=1, tokens_out=1, context_tokens=0),
        source=BOARD,
        pin_first=False,
        shared=shared_tensors(chain),
    )


def read(model: onnx.ModelProto) -> tuple[Graph, tuple[Block, ...]]:
    return read_graph(model), blocks(model)


def test_a_model_with_narrow_branches_is_cut_through_them() -> None:
    graph, chain = read(branched())
    problem = replace(stated(chain), pin_first=True)

    answer = split(problem, graph, chain, [BOARD, SERVER], StepBudget(ENOUGH))

    assert isinstance(answer, GraphPlan)
    assert (answer.solver, answer.gap) == ("min-cut", 0.0)
    assert answer.parts[0].names == ("v0", "v1", "v3")
    assert answer.parts[0].sends == ("v1", "v3")
    assert answer.parts[0].send_bytes == 2 * 2 * 64 * 4
    assert answer.chain_latency_s is not None
    assert answer.chain_latency_s > 1.2 * answer.latency_s


def test_measured_times_of_blocks_are_spread_over_their_operators() -> None:
    graph, chain = read(branched())
    problem = stated(chain)

    asked = question(problem, graph, chain, [BOARD, SERVER])

    for device, tier in zip(problem.devices, asked.problem.tiers, strict=True):
        ends = [0, *asked.cuts, len(tier.op_s)]
        sums = [sum(tier.op_s[a:b]) for a, b in pairwise(ends)]
        assert sums == pytest.approx(list(device.prefill_s))
    stem, neck = asked.problem.tiers[0].op_s[:2]
    assert stem / neck == pytest.approx(3 * 64 / (64 * 2))


def test_a_weight_of_two_operators_is_shared() -> None:
    net = Net()
    first = net.conv("x", 64, 64)
    model = net.model(64, net.conv(net.conv(first, 64, 64, weight="w0"), 64, 64))
    graph, chain = read(model)

    asked = question(stated(chain), graph, chain, [BOARD, SERVER]).problem

    assert [op.weights_bytes for op in asked.ops] == [64 * 64 * 4] * 3
    assert [(shared.size_bytes, shared.ops) for shared in asked.shared] == [(64 * 64 * 4, (0, 1))]


def test_blocks_that_stay_on_the_source_stay_there_whole() -> None:
    graph, chain = read(branched())
    problem = replace(stated(chain, slowness=1e4), pin_first=True)

    answer = split(problem, graph, chain, [BOARD, SERVER], StepBudget(ENOUGH))

    assert isinstance(answer, GraphPlan)
    first = [n.outputs[0] for at, n in enumerate(graph.nodes) if at < chain[0].node_stop]
    assert list(answer.parts[0].names) == first


@pytest.mark.parametrize(
    ("change", "tiers", "message"),
    [
        ({"shape": RequestShape(tokens_in=1, tokens_out=2)}, (BOARD, SERVER), "latency of one pass"),
        ({"objective": Objective.THROUGHPUT}, (BOARD, SERVER), "latency of one pass"),
        ({"pin_last": True}, (BOARD, SERVER), "does not come back"),
        ({}, (SERVER, BOARD), "begins at the source board"),
        ({}, (BOARD, NodeId("moon")), "moon may hold no block here"),
        ({"exclude": (SERVER,)}, (BOARD, SERVER), "server may hold no block here"),
        ({"pins": (Pin(block=0, node=NodeId("moon")),)}, (BOARD, SERVER), "pinned to moon, which is no tier here"),
    ],
)
def test_what_cannot_be_asked_of_a_graph_is_refused(
    change: dict[str, object], tiers: tuple[NodeId, ...], message: str
) -> None:
    graph, chain = read(branched())

    with pytest.raises(InvalidRequestError, match=message):
        split(replace(stated(chain), **change), graph, chain, tiers, StepBudget(ENOUGH))


@pytest.mark.parametrize("rate", [1e5, 1e6, 1e7])
def test_a_detector_is_cut_with_a_proof_over_all_of_its_operators(ocr_folder: Path, rate: float) -> None:
    model = import_onnx(ocr_folder / "tiny" / "det" / "det.onnx", name="det").graph
    graph, chain = read(model)
    problem = stated(chain, rate)

    answer = split(problem, graph, chain, [BOARD, SERVER], StepBudget(100))

    assert isinstance(answer, GraphPlan)
    assert answer.gap == 0.0
    assert sum(len(part.ops) for part in answer.parts) == sum(node.spine for node in graph.nodes)
    assert answer.chain_latency_s is not None
    assert answer.latency_s <= answer.chain_latency_s * (1 + 1e-9)


def test_scores_of_an_encoder_are_never_cut(minilm_int8: Path) -> None:
    """They grow with the square of the rows, so that two sizes do not tell a third."""
    graph, chain = read(import_onnx(minilm_int8, name="minilm").graph)
    problem = replace(stated(chain), shape=RequestShape(tokens_in=8, tokens_out=1, context_tokens=0))

    asked = question(problem, graph, chain, [BOARD, SERVER]).problem

    unsure = {name for name, known in graph.types.items() if (known.bytes_fixed or 0) < 0}
    assert unsure
    assert not unsure & {tensor.name for tensor in asked.tensors}
    assert len(asked.ops) < sum(node.spine for node in graph.nodes)
