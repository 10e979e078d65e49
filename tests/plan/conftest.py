"""Small problems with round numbers."""

import random
from collections.abc import Callable, Sequence
from itertools import permutations

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


Fleet = Callable[..., Problem]


@pytest.fixture
def fleet() -> Fleet:
    """Unequal blocks (+-50 %) on unequal devices, all of whose memory together is `tightness` times what the blocks need.

    `star`: each device has an access link; `clusters`: sites of a few devices, with slow links between; `mesh`: any link.
    """

    def make(seed: int, devices: int, blocks: int, family: str, tightness: float, **changes: object) -> Problem:
        chance = random.Random(seed)
        sizes = [chance.randint(50, 150) for _ in range(blocks)]
        kinds = [chance.choice(((6, 25), (8, 68), (16, 102), (24, 205), (24, 936))) for _ in range(devices)]
        memory = tightness * sum(sizes) / sum(share for share, _ in kinds)
        nodes = [NodeId(f"n{index}") for index in range(devices)]
        reach = _links(chance, devices, family)
        return Problem(
            blocks=tuple(
                BlockSpec(name=f"block {i}", weights_bytes=size, output_bytes_per_token=16)
                for i, size in enumerate(sizes)
            ),
            devices=tuple(
                DeviceSpec(
                    node=node,
                    memory_budget_bytes=int(memory * share),
                    decode_s=(times := tuple(size / speed * chance.uniform(0.01, 0.02) for size in sizes)),
                    prefill_s=tuple(3 * time_s for time_s in times),
                    step_overhead_s=0.001,
                )
                for node, (share, speed) in zip(nodes, kinds, strict=True)
            ),
            links=tuple(
                LinkSpec(source=nodes[a], target=nodes[b], latency_s=latency_s, bytes_per_s=bytes_per_s)
                for (a, b), (latency_s, bytes_per_s) in reach.items()
            ),
            shape=RequestShape(tokens_in=8, tokens_out=8, context_tokens=0),
            source=nodes[0],
            **changes,
        )

    return make


def _links(chance: random.Random, devices: int, family: str) -> dict[tuple[int, int], tuple[float, float]]:
    access = [chance.choice(((0.001, 1e6), (0.004, 5e4), (0.015, 2e4))) for _ in range(devices)]
    sites = max(2, devices // 5)
    found = {}
    for a, b in permutations(range(devices), 2):
        if family == "star":
            found[a, b] = (access[a][0] + access[b][0], min(access[a][1], access[b][1]))
        elif family == "clusters" and a % sites == b % sites:
            found[a, b] = (chance.uniform(0.0005, 0.002), 1e6)
        elif family == "clusters":
            found[a, b] = (chance.uniform(0.01, 0.04), chance.uniform(5e3, 5e4))
        else:
            found[a, b] = (chance.uniform(0.001, 0.03), 10 ** chance.uniform(3, 6))
    return found
