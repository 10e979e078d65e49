"""Small problems with round numbers."""

from collections.abc import Callable, Sequence

import pytest

from shoal.ids import NodeId
from shoal.plan.problem import BlockSpec, DeviceSpec, LinkSpec, Problem, RequestShape

Chain = Callable[..., Problem]


@pytest.fixture
def chain() -> Chain:
    """Problem of unit-size blocks: `times[j]` seconds per block on device j, `links[i, j]` seconds per token both ways."""

    def make(
        sizes: Sequence[int],
        times: Sequence[float],
        memory: Sequence[int],
        links: dict[tuple[int, int], float],
        **changes: object,
    ) -> Problem:
        nodes = [NodeId(f"n{index}") for index in range(len(times))]
        return Problem(
            blocks=tuple(BlockSpec(name=f"block {index}", weights_bytes=size) for index, size in enumerate(sizes)),
            devices=tuple(
                DeviceSpec(
                    node=node,
                    memory_budget_bytes=memory[index],
                    decode_s=tuple(size * times[index] for size in sizes),
                    prefill_s=tuple(size * times[index] for size in sizes),
                )
                for index, node in enumerate(nodes)
            ),
            links=tuple(
                LinkSpec(source=nodes[a], target=nodes[b], latency_s=latency_s, bytes_per_s=1e9)
                for (i, j), latency_s in links.items()
                for a, b in ((i, j), (j, i))
            ),
            shape=RequestShape(tokens_in=1, tokens_out=1, context_tokens=0),
            source=nodes[0],
            **changes,
        )

    return make
