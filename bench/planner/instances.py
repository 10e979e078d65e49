"""Problems to compare planners on: families, each with numbered seeds, the same on every machine.

Randomness is counter-based: a draw is a hash of (family, seed, what it is for), so that no draw moves another and an instance can
be made again from its name.  `HELD_OUT` seeds are for published figures; whoever tunes a solver uses those from `TUNING` on.

    python -m bench.planner.instances FOLDER        # the small families as problem files for `shoal plan --problem`

Blocks.  32, 40 and 80 identical ones with the bytes of a Llama 2 layer of 7B, 13B and 70B in fp16 (405, 634, 1711 MB; activations
8, 10, 16 KiB per token; cache 16, 20, 4 KiB per token).  Uneven: each block's weights and times are 0.5 to 1.5 times that.

Devices.  Ten classes by memory speed, three of them the EdgeShard testbed's (Orin NX 102.4, AGX Orin 204.8, RTX 3090 936 GB/s at
1.88, 3.33 and 36 TFLOPS), the others spread around them at the boards' ratio of arithmetic to memory speed.  Decoding is bound
by memory, a prompt by the slower of both; devices of a class are alike.  Sizes of memory are in proportion to the class's and
scaled until all together hold the model `tightness` times; `most_blocks` caps what one device can hold, so that a large fleet has
long chains.

Networks.
    star       each device has an access line (wired, wireless or wide-area); latencies add up, the slower end gives the rate
    clusters   sites of about six on a switch, joined pairwise by wide-area links
    mesh       each direction for itself: 1 to 1000 Mbit/s (log-uniform), 1 to 30 ms
    trace      links like published ones: switched Ethernet of 1000 Mbit/s; Wi-Fi shaped as EdgeShard shapes
               it, 50 Mbit/s +-20 %, all of a site on one channel; between sites 250 Mbit/s (BloomBee), 100 Mbit/s at a round
               trip of 100 ms (Petals), or 20 ms between cities (mesh-llm); one cloud site behind EdgeShard's swept 1 to 50 Mbit/s
"""

import argparse
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec

from bench.planner.networks import Draws, Line, lines
from shoal.ids import NodeId
from shoal.plan.problem import BlockSpec, DeviceSpec, LinkSpec, Objective, Problem, RequestShape

HELD_OUT = 0
TUNING = 1000
"""First seeds of either kind."""

Layers = Literal["uniform", "uneven"]
NETWORKS = ("star", "clusters", "mesh", "trace")
TIGHTNESS = (1.05, 1.2, 1.5, 2.5, 5.0)
CONTEXTS = (512, 4096)
IN_FLIGHT = (4, 8, 32)
_REQUESTS = {512: (128, 128), 4096: (1024, 512)}
"""Tokens in and out that are typical of a context."""
_LAYER = {32: (405_000_000, 8192, 16_384), 40: (634_000_000, 10_240, 20_480), 80: (1_711_000_000, 16_384, 4096)}
"""By the number of blocks: weights, activation per token, cache per token."""
_CLASSES = (
    (25, 0.45, 4), (38, 0.65, 8), (57, 1.0, 8), (85, 1.4, 16), (102.4, 1.88, 16),
    (150, 2.6, 12), (204.8, 3.33, 32), (300, 5.1, 24), (550, 9.4, 64), (936, 36, 24),
)  # fmt: skip
"""GB/s, TFLOPS, and memory in proportion."""
_REACHED = 0.9
"""Of the memory speed, when a layer is read."""
_OVERHEAD_S = 0.0005


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What instances have in common."""

    layers: Layers
    network: str
    devices: int
    blocks: int
    tightness: float = 2.5
    context: int = 512
    in_flight: int = 1
    most_blocks: int = 0
    """0: no cap."""
    objective: Objective = Objective.LATENCY

    @property
    def name(self) -> str:
        return f"{self.layers} {self.network} {self.devices}x{self.blocks} {self.objective.value}"


def varied(family: Family, seed: int) -> Family:
    """The family's tightness, context and micro-batches in flight by seed: 30 seeds go through every combination once."""
    streams = IN_FLIGHT if family.objective is Objective.THROUGHPUT else (1, 4, 32)
    return replace(
        family,
        tightness=TIGHTNESS[seed % 5],
        context=CONTEXTS[seed // 5 % 2],
        in_flight=streams[seed // 10 % 3],
    )


def instance(family: Family, seed: int) -> Problem:
    """The problem with this family and seed."""
    draws = Draws((*(str(value) for name, value in asdict(family).items() if name != "objective"), str(seed)))
    shape = _shape(family)
    blocks = _blocks(family, draws)
    classes = [_class(draws, index) for index in range(family.devices)]
    need = [b.weights_bytes + b.kv_bytes_per_token * shape.context_tokens * shape.slots for b in blocks]
    budgets = _budgets(family, [_CLASSES[c][2] for c in classes], need)
    nodes = [NodeId(f"n{index:03}") for index in range(family.devices)]
    devices = tuple(
        _device(node, (kind, budget), blocks, shape) for node, kind, budget in zip(nodes, classes, budgets, strict=True)
    )
    return Problem(
        blocks=blocks,
        devices=devices,
        links=tuple(_link(nodes, line) for line in lines(family.network, family.devices, draws)),
        shape=shape,
        objective=family.objective,
        source=nodes[0],
    )


def digest(problem: Problem) -> str:
    """A fingerprint of the figures; fields that problems gain later do not change it."""
    blocks = [(b.weights_bytes, b.kv_bytes_per_token, b.output_bytes_per_token) for b in problem.blocks]
    devices = [(d.node, d.memory_budget_bytes, d.step_overhead_s, d.decode_s, d.prefill_s) for d in problem.devices]
    links = [(k.source, k.target, k.latency_s, k.bytes_per_s, k.medium) for k in problem.links]
    shape = (problem.shape.tokens_in, problem.shape.tokens_out, problem.shape.context_tokens, problem.shape.slots)
    said = repr((blocks, devices, links, shape, problem.source))
    return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()


def _shape(family: Family) -> RequestShape:
    tokens_in, tokens_out = _REQUESTS[family.context]
    return RequestShape(
        tokens_in=tokens_in,
        tokens_out=tokens_out,
        context_tokens=family.context,
        slots=family.in_flight,
        in_flight=family.in_flight,
        prefill_chunk_tokens=tokens_in,
    )


def _blocks(family: Family, draws: Draws) -> tuple[BlockSpec, ...]:
    weights_bytes, output_bytes, kv_bytes = _LAYER[family.blocks]
    uneven = family.layers == "uneven"
    factors = [draws.between(0.5, 1.5, "layer", i) if uneven else 1.0 for i in range(family.blocks)]
    return tuple(
        BlockSpec(
            name=f"layer {i}",
            weights_bytes=round(weights_bytes * factor),
            kv_bytes_per_token=kv_bytes,
            output_bytes_per_token=output_bytes,
        )
        for i, factor in enumerate(factors)
    )


def _class(draws: Draws, index: int) -> int:
    """The source is one of the middling boards."""
    return draws.below(len(_CLASSES), "class", index) if index else 3 + draws.below(4, "class", index)


def _budgets(family: Family, sizes: list[int], need: list[int]) -> list[int]:
    """Bytes in proportion to *sizes*, `tightness` times the model together; the source holds one block at least."""
    most = family.most_blocks * max(need) if family.most_blocks else math.inf
    wanted = min(family.tightness * sum(need), most * len(sizes))
    low, high = 0.0, wanted
    for _ in range(60):
        scale = (low + high) / 2
        low, high = (scale, high) if sum(min(scale * size, most) for size in sizes) < wanted else (low, scale)
    budgets = [round(min(high * size, most)) for size in sizes]
    return [max(budgets[0], need[0]), *budgets[1:]]


def _device(node: NodeId, kind: tuple[int, int], blocks: Sequence[BlockSpec], shape: RequestShape) -> DeviceSpec:
    """A prompt needs two operations for each parameter and token, which at fp16 is one for each byte of weights."""
    index, budget = kind
    gigabytes_per_s, tera_flops, _ = _CLASSES[index]
    bytes_per_s, flops = gigabytes_per_s * 1e9 * _REACHED, tera_flops * 1e12
    context = shape.tokens_in + shape.tokens_out / 2
    return DeviceSpec(
        node=node,
        memory_budget_bytes=budget,
        step_overhead_s=_OVERHEAD_S,
        decode_s=tuple((b.weights_bytes + b.kv_bytes_per_token * context) / bytes_per_s for b in blocks),
        prefill_s=tuple(b.weights_bytes * max(1 / bytes_per_s, shape.tokens_in / flops) for b in blocks),
        device_class=f"class {index}",
    )


def _link(nodes: list[NodeId], line: Line) -> LinkSpec:
    return LinkSpec(
        source=nodes[line.source],
        target=nodes[line.target],
        latency_s=line.latency_s,
        bytes_per_s=line.bytes_per_s,
        medium=line.medium,
    )


def small_families() -> Iterator[Family]:
    """Those that are compared on every combination of tightness, context and micro-batches in flight."""
    for objective in (Objective.LATENCY, Objective.THROUGHPUT):
        for layers in ("uniform", "uneven"):
            for network in NETWORKS:
                for devices in (4, 8):
                    yield Family(layers=layers, network=network, devices=devices, blocks=32, objective=objective)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.planner.instances")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=30)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    for family in small_families():
        for seed in range(HELD_OUT, HELD_OUT + asked.seeds):
            path = asked.folder / f"{family.name.replace(' ', '_')}_{seed}.json"
            path.write_bytes(msgspec.json.encode(instance(varied(family, seed), seed)))


if __name__ == "__main__":
    main()
