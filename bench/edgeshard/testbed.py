"""EdgeShard's testbed as problems: `python -m bench.edgeshard.testbed` writes `examples/problems/edgeshard_*.json`.

Where each figure comes from stands in `examples/problems/README.md`; the tags in comments here are its short form: [paper] printed
in arXiv 2405.14371, [shape] arithmetic on Llama 2's published shapes, [fit] chosen so that a figure that the paper prints comes
out, [assumed] neither.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

from shoal.ids import NodeId
from shoal.plan.check import check
from shoal.plan.problem import BatchTimes, BlockSpec, DeviceSpec, LinkSpec, Problem, RequestShape
from shoal.plan.simulated import jitter

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "problems"
MBIT_S = 1e6 / 8
LINK_SEED = 2405
"""Of the bandwidths, which the files write out."""

SOURCE, CLOUD = NodeId("agx-1"), NodeId("rtx-3090")
AGX, NX, RTX = "agx-orin", "orin-nx", "rtx-3090"
FLOPS = {AGX: 3.33e12, NX: 1.88e12, RTX: 36e12}  # [paper]
NX_SLOWER = 8.0 / 4.386  # [assumed] between the ratio of FLOPS (1.77) and that of memory bandwidths (2)
BATCHED, BATCH_COSTS = 8, 328.6 / 140.34  # [fit] Edge-Solo's 24.36 tok/s at a batch of 8
TOKENS_IN, TOKENS_OUT = 32, 96  # [paper]


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the table: sizes at the precision that fits, and milliseconds per layer."""

    name: str
    layers: int
    layer_parameters: int
    bytes_per_parameter: int
    end_bytes: int
    """Embedding, and head."""
    kv_bytes: int
    """Per token and layer."""
    row_bytes: int
    agx_ms: float
    rtx_ms: float
    agx_gb: float
    slots: int
    """Sequences at once, when throughput is asked for."""


MODELS = (
    Model(
        name="7b", layers=32, layer_parameters=202_400_000, bytes_per_parameter=4, end_bytes=524_000_000, kv_bytes=32 * 1024,
        row_bytes=16 * 1024, agx_ms=4.386, rtx_ms=1.63, agx_gb=28.1, slots=8,
    ),
    Model(
        name="13b", layers=40, layer_parameters=317_200_000, bytes_per_parameter=2, end_bytes=328_000_000, kv_bytes=20 * 1024,
        row_bytes=10 * 1024, agx_ms=8.47, rtx_ms=3.40, agx_gb=26.0, slots=4,
    ),
    Model(
        name="70b", layers=80, layer_parameters=855_700_000, bytes_per_parameter=4, end_bytes=1_049_000_000, kv_bytes=8 * 1024,
        row_bytes=32 * 1024, agx_ms=38.0, rtx_ms=38.0 * 1.63 / 4.386, agx_gb=28.1, slots=4,
    ),
)  # fmt: skip


def problem_of(model: Model, cloud_mbit_s: float = 1.0) -> Problem:
    """One request at a time, for its latency."""
    nodes = {NodeId(f"agx-{i}"): AGX for i in range(1, 13)} | {NodeId(f"nx-{i}"): NX for i in (1, 2)} | {CLOUD: RTX}
    problem = Problem(
        blocks=_blocks(model),
        devices=tuple(_device(model, node, kind) for node, kind in nodes.items()),
        links=_links(list(nodes), cloud_mbit_s),
        shape=RequestShape(
            tokens_in=TOKENS_IN, tokens_out=TOKENS_OUT, context_tokens=TOKENS_IN + TOKENS_OUT, slots=1,
            prefill_chunk_tokens=TOKENS_IN,
        ),
        source=SOURCE,
    )  # fmt: skip
    check(problem)
    return problem


def decoding(problem: Problem, batch: int, in_flight: int) -> Problem:
    """The same with steps of one kind: prompts of one row.  What the printed throughputs agree with (see the README)."""
    shape = replace(problem.shape, tokens_in=1, slots=batch * in_flight, batch=batch, in_flight=in_flight)
    devices = tuple(replace(device, prefill_s=device.decode_s) for device in problem.devices)
    return replace(problem, shape=shape, devices=devices)


def only(problem: Problem, nodes: Sequence[NodeId]) -> Problem:
    """The same fleet, most of it switched off."""
    return replace(
        problem,
        devices=tuple(device for device in problem.devices if device.node in nodes),
        links=tuple(link for link in problem.links if link.source in nodes and link.target in nodes),
    )


def _blocks(model: Model) -> tuple[BlockSpec, ...]:
    layers = tuple(
        BlockSpec(
            name=f"layer {index}",
            weights_bytes=model.layer_parameters * model.bytes_per_parameter,
            kv_bytes_per_token=model.kv_bytes,
            output_bytes_per_token=model.row_bytes,
        )
        for index in range(model.layers)
    )
    embedding = BlockSpec(name="embedding", weights_bytes=model.end_bytes, output_bytes_per_token=model.row_bytes)
    return (embedding, *layers, BlockSpec(name="head", weights_bytes=model.end_bytes))


def _device(model: Model, node: NodeId, kind: str) -> DeviceSpec:
    step_s = {AGX: model.agx_ms, NX: model.agx_ms * NX_SLOWER, RTX: model.rtx_ms}[kind] / 1000
    # A prompt reads the weights once, like a step, or is bound by arithmetic.
    prompt_s = max(step_s, 2 * model.layer_parameters * TOKENS_IN / FLOPS[kind])

    def whole(layer_s: float) -> tuple[float, ...]:
        """Embedding and head are folded into the layers' time."""
        return (0.0, *[round(layer_s, 7)] * model.layers, 0.0)

    return DeviceSpec(
        node=node,
        memory_budget_bytes=int({AGX: model.agx_gb, NX: 13.0, RTX: 22.5}[kind] * 1e9),
        decode_s=whole(step_s),
        prefill_s=whole(prompt_s),
        batched=(BatchTimes(batch=BATCHED, decode_s=whole(step_s * BATCH_COSTS)),),
        device_class=kind,
    )


def _links(nodes: Sequence[NodeId], cloud_mbit_s: float) -> tuple[LinkSpec, ...]:
    """Alike both ways: 50 Mbit/s +-20 % by pair, and the source's link to the cloud."""
    factor = jitter(0.2, LINK_SEED)
    rates = {
        frozenset((a, b)): cloud_mbit_s if {a, b} == {SOURCE, CLOUD} else round(50 * factor(i, j), 2)
        for i, a in enumerate(nodes)
        for j, b in enumerate(nodes)
        if i < j
    }
    return tuple(
        LinkSpec(source=a, target=b, latency_s=0.0, bytes_per_s=rates[frozenset((a, b))] * MBIT_S)
        for a in nodes
        for b in nodes
        if a != b
    )


def path(model: Model) -> Path:
    return FOLDER / f"edgeshard_{model.name}.json"


def document(problem: Problem) -> str:
    """JSON with a line per block, device and link, and without what is at its default."""
    default = msgspec.to_builtins(Problem(blocks=(), devices=(), links=(), source=NodeId("")))
    fields: Mapping[str, object] = msgspec.to_builtins(problem)
    kept = {name: value for name, value in fields.items() if name == "version" or value != default[name]}
    parts = [f'  "{name}": {_lines(value)}' for name, value in kept.items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _lines(value: object) -> str:
    if isinstance(value, list | tuple):
        return "[\n" + ",\n".join(f"    {json.dumps(_set(item))}" for item in value) + "\n  ]"
    return json.dumps(value)


def _set(item: dict[str, object]) -> dict[str, object]:
    """A block, device or link without zeros, empty names and lists: those are what the reader takes for granted."""
    always = {"latency_s", "decode_s", "prefill_s"}
    kept = {name: value for name, value in item.items() if name in always or value not in (0, "", (), None, False)}
    return {name: value for name, value in kept.items() if (name, value) != ("weights_factor", 1.0)}


def main() -> None:
    for model in MODELS:
        path(model).write_text(document(problem_of(model)))
        print(f"wrote {path(model).relative_to(FOLDER.parents[1])}")


if __name__ == "__main__":
    main()
