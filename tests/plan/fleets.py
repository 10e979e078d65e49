"""Fleets of a thousand kinds from a seed: identical blocks, or blocks of a few kinds in turn, on unequal devices."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from shoal.ids import NodeId
from shoal.plan.problem import BlockSpec, DeviceSpec, LinkSpec, Objective, Problem, RequestShape

LAYER_BYTES, HEAD_BYTES = 855_000_000, 524_000_000
SPEEDS = (204.8e9, 102.4e9, 936e9, 68e9, 51e9, 400e9, 150e9, 273e9, 34e9, 120e9)
SITES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """`links`: star, mesh or sites; `tight`: memory of the fleet over that of the model; `spread`: noise of block times."""

    devices: int
    layers: int
    links: str = "mesh"
    tight: float = 1.5
    kinds: tuple[float, ...] = (1.0,)
    spread: float = 0.0
    objective: Objective = Objective.LATENCY
    in_flight: int = 1


def fleet(family: Family, seed: int) -> Problem:
    """A problem in the manner of a large language model at 4 bits: embedding, layers of the given kinds, head."""
    rng = Random(seed)
    layers = family.layers * len(family.kinds)
    sizes = [HEAD_BYTES, *(int(LAYER_BYTES * family.kinds[i % len(family.kinds)]) for i in range(layers)), HEAD_BYTES]
    factors = [1 + family.spread * rng.uniform(-1, 1) for _ in sizes]
    types = [rng.randrange(len(SPEEDS)) for _ in range(family.devices)]
    room = [rng.choice((8, 8, 16, 16, 24, 32, 64)) for _ in types]
    scale = family.tight * sum(sizes) / sum(room)
    nodes = [NodeId(f"n{index}") for index in range(family.devices)]
    least = 2.2 * max(sizes)
    return Problem(
        blocks=tuple(
            BlockSpec(name=f"block {i}", weights_bytes=size, output_bytes_per_token=16_384)
            for i, size in enumerate(sizes)
        ),
        devices=tuple(
            DeviceSpec(
                node=node,
                memory_budget_bytes=int(max(room[i] * scale, least if i == 0 else 0)),
                step_overhead_s=0.0005,
                decode_s=tuple(s * f / SPEEDS[types[i]] for s, f in zip(sizes, factors, strict=True)),
                prefill_s=tuple(2 * s * f / SPEEDS[types[i]] for s, f in zip(sizes, factors, strict=True)),
            )
            for i, node in enumerate(nodes)
        ),
        links=tuple(_links(nodes, family.links, rng)),
        shape=RequestShape(
            tokens_in=32, tokens_out=96, context_tokens=128, slots=family.in_flight, in_flight=family.in_flight
        ),
        objective=family.objective,
        source=nodes[0],
    )


def _links(nodes: Sequence[NodeId], kind: str, rng: Random) -> Iterator[LinkSpec]:
    up = [rng.choice(((0.002, 6e6), (0.0003, 1.2e8), (0.012, 2.5e6), (0.004, 3e7))) for _ in nodes]
    down = [(delay, rate * rng.uniform(1, 3)) for delay, rate in up]
    site = [rng.randrange(SITES) for _ in nodes]
    for i, a in enumerate(nodes):
        for j, b in enumerate(nodes):
            if i == j:
                continue
            if kind == "star":
                delay, rate = up[i][0] + down[j][0], min(up[i][1], down[j][1])
            elif kind == "sites" and site[i] == site[j]:
                delay, rate = rng.uniform(0.0002, 0.001), 1.2e8
            elif kind == "sites":
                delay, rate = rng.uniform(0.01, 0.03), rng.uniform(1e6, 1e7)
            else:
                delay, rate = 10 ** rng.uniform(-3, -1.5), 10 ** rng.uniform(5.1, 8.1)
            yield LinkSpec(source=a, target=b, latency_s=delay, bytes_per_s=rate)
