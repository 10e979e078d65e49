"""A block with two narrow branches between wide tensors: the cheapest cut goes straight through it."""

from collections.abc import Callable, Sequence

import pytest

from shoal.ids import NodeId
from shoal.plan.dag.problem import GraphProblem, OpSpec, TensorSpec, TierLink, TierSpec

NODES = tuple(NodeId(name) for name in ("board", "gateway", "server"))
Line = Callable[..., GraphProblem]


@pytest.fixture
def line() -> Line:
    """Operators with these tensors (size, maker, readers); tier k takes `times[k]` seconds each, links one second per byte."""

    def make(
        tensors: Sequence[tuple[int, int | None, Sequence[int]]],
        times: Sequence[float],
        *,
        weights: Sequence[int] = (),
        memory: Sequence[int] = (),
        **changes: object,
    ) -> GraphProblem:
        count = 1 + max(op for _, maker, readers in tensors for op in (maker, *readers) if op is not None)
        pairs = [(a, b) for k in range(len(times) - 1) for a, b in ((k, k + 1), (k + 1, k))]
        return GraphProblem(
            ops=tuple(OpSpec(name=f"op {i}", weights_bytes=weights[i] if weights else 0) for i in range(count)),
            tensors=tuple(
                TensorSpec(name=f"t{i}", size_bytes=size, producer=maker, consumers=tuple(readers))
                for i, (size, maker, readers) in enumerate(tensors)
            ),
            tiers=tuple(
                TierSpec(node=NODES[k], op_s=(seconds,) * count, memory_budget_bytes=memory[k] if memory else 10**9)
                for k, seconds in enumerate(times)
            ),
            links=tuple(TierLink(source=NODES[a], target=NODES[b], latency_s=0.0, bytes_per_s=1.0) for a, b in pairs),
            **changes,
        )

    return make


@pytest.fixture
def branches(line: Line) -> GraphProblem:
    """in -> 0 -> wide -> (1 narrow 2 wide | 3 narrow 4 wide) -> 5; operators are listed branch by branch."""
    return line(
        [(200, None, [0]), (90, 0, [1, 3]), (2, 1, [2]), (80, 2, [5]), (2, 3, [4]), (80, 4, [5]), (60, 5, [6])],
        [10.0, 1.0],
    )
