"""Whatever a graph problem file says, the answer is an error that names it, or a plan that is one."""

import json
import math
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from shoal.errors import ShoalError
from shoal.plan.budget import StepBudget
from shoal.plan.dag.placement import place_graph
from shoal.plan.dag.problem import GraphPlan, GraphProblem, OpPin, OpSpec, SharedWeights, TensorSpec, TierLink, TierSpec
from shoal.plan.document import answer_json, parse_either

ODD = (0, -1, 1, 0.5, 2**40, 2**62, 2**70, 1e18, 1e308, 1e-300, "", "n9", "n1", None, True, [], {}, [0], [[]], [None])
Place = tuple[str | int, ...]


def rich() -> GraphProblem:
    """Three tiers, and every field that there is in use."""
    nodes = ("n0", "n1", "n2")
    return GraphProblem(
        ops=tuple(OpSpec(name=f"op {i}", weights_bytes=5, workspace_bytes=1) for i in range(3)),
        tensors=(
            TensorSpec(name="in", size_bytes=4, consumers=(0,)),
            TensorSpec(name="a", size_bytes=3, producer=0, consumers=(1, 2)),
            TensorSpec(name="b", size_bytes=2, producer=1, consumers=(2,)),
            TensorSpec(name="c", size_bytes=1, producer=2, returned=True),
        ),
        tiers=tuple(
            TierSpec(
                node=node,
                op_s=(3.0 / (1 + k),) * 3,
                memory_budget_bytes=20 - k,
                memory_promised_bytes=1,
                fixed_bytes=1,
                weights_factor=1.1,
                step_overhead_s=0.1,
            )
            for k, node in enumerate(nodes)
        ),
        links=tuple(
            TierLink(source=a, target=b, latency_s=0.1, bytes_per_s=9.0)
            for a, b in (("n0", "n1"), ("n1", "n0"), ("n1", "n2"), ("n2", "n1"))
        ),
        pins=(OpPin(op=0, node="n0"),),
        shared=(SharedWeights(size_bytes=2, ops=(1, 2)),),
    )


def places(value: object, path: Place = ()) -> Iterator[Place]:
    """Of every value within a document, lists and objects included."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def with_value(path: Place, value: object) -> bytes:
    document: Any = json.loads(msgspec.json.encode(rich()))
    at = document
    for part in path[:-1]:
        at = at[part]
    at[path[-1]] = value
    return json.dumps(document).encode()


PLACES = list(places(json.loads(msgspec.json.encode(rich()))))


@pytest.mark.parametrize("path", PLACES, ids=lambda path: ".".join(str(part) for part in path))
def test_an_odd_value_is_refused_or_planned_with(path: Place) -> None:
    for value in ODD:
        try:
            answer = place_graph(parse_either(with_value(path, value)), StepBudget(300))
        except ShoalError:
            continue
        assert b"NaN" not in answer_json(answer)
        if isinstance(answer, GraphPlan):
            assert math.isfinite(answer.latency_s)
            assert 0 <= answer.lower_bound <= answer.latency_s
            assert sorted(op for part in answer.parts for op in part.ops) == [0, 1, 2]


@pytest.mark.parametrize("text", [b"", b"[]", b"3", b'"graph"', b'{"kind": "graph"}', b"{", b"\xff", b'{"kind": []}'])
def test_what_is_no_problem_is_refused(text: bytes) -> None:
    with pytest.raises(ShoalError):
        parse_either(text)


def test_sixteen_tiers_of_one_operator_each_are_planned_for() -> None:
    tiers = tuple(
        TierSpec(node=f"n{k}", op_s=(100.0 - 6 * k,) * 16, memory_budget_bytes=10 if k < 15 else 100) for k in range(16)
    )
    problem = GraphProblem(
        ops=tuple(OpSpec(name=f"op {i}", weights_bytes=10) for i in range(16)),
        tensors=tuple(
            TensorSpec(name=f"t{i}", size_bytes=1, producer=i, consumers=(i + 1,) if i < 15 else ()) for i in range(16)
        ),
        tiers=tiers,
        links=tuple(TierLink(source=f"n{k}", target=f"n{k + 1}", latency_s=0.01, bytes_per_s=100.0) for k in range(15)),
    )

    answer = place_graph(problem, StepBudget(5000))

    assert isinstance(answer, GraphPlan)
    assert answer.gap < 1e-9
    assert all(part.memory_bytes <= 100 for part in answer.parts)
