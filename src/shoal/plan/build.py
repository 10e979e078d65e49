"""From a cut model and a measured fleet to a problem.

The fit of a device's trials prices each block at the shape that was asked: decode at the context in the middle of the
answer, prefill as the whole prompt in its chunks.  What trials cannot tell yet, the memory of a worker beyond its
weights, comes from `MemoryModel`, whose defaults were measured once (CPU, SmolLM2-135M at 4 bits, 116 MB of weights) and hold
for every device and model: what live workers turn out to need does not correct them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from shoal.errors import InvalidRequestError
from shoal.ids import NodeId
from shoal.model.frontier import Block
from shoal.plan.problem import (
    BatchTimes,
    BlockSpec,
    Choose,
    Cloud,
    DeviceSpec,
    Limits,
    LinkSpec,
    Objective,
    OutputBytes,
    Pin,
    Problem,
    Relays,
    RequestShape,
    Residency,
    SharedTensor,
)
from shoal.plan.written import allowed
from shoal.profile.fit import KindFit, fit
from shoal.profile.fleet import BlockTrial, Declared, DeviceProfile, FleetProfile, LinkProfile
from shoal.transport.codec import Codec, applied, encoded_bytes

FLOAT32_BYTES = 4


class MemoryModel(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker holds beyond the bytes of its weights and cache."""

    fixed_bytes: int = 96 * 2**20
    """Interpreter, engine and fabric before the first weight: 44 MB are Python with the engine, the rest the fabric's."""
    weights_factor: float = 1.1
    """Packed per stored byte; 142 MB held per session, less 24 MB of cache, over 116 MB stored is 1.02."""
    workspace_bytes_per_row: int = 200_000
    """Activations of one row: 8 KB for each of some 24 live tensors, for hidden sizes up to 2048."""
    load_peak_factor: float = 1.0
    """Of the largest tensor: mapped while its packed copy is made, dropped afterwards.  From heap it would be of all of them."""


class Demands(msgspec.Struct, frozen=True, kw_only=True):
    """What the user fixes by hand; each field as in `Problem`."""

    pin_first: bool = True
    pin_last: bool = False
    pins: tuple[Pin, ...] = ()
    max_stages: int = 0
    stages_exactly: int = 0
    exclude: tuple[NodeId, ...] = ()
    limits: Limits = Limits()
    residency: Residency = Residency()
    choose: Choose = Choose()
    cloud: Cloud | None = None
    relays: Relays = Relays.NEVER
    activations: Codec = Codec.RAW
    """How float32 tensors are written between stages."""
    activations_per_cut: bool = False
    """It is chosen for each cut, and loses no more than `activations` does."""
    draft: tuple[Block, ...] = ()
    """Of a model that guesses on the source, beside the first stage: it takes memory there."""


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """The circumstances of a plan apart from the model and the fleet."""

    objective: Objective = Objective.LATENCY
    promised_bytes: dict[NodeId, int] = {}
    """Held by other deployments."""
    demands: Demands = Demands()
    memory: MemoryModel = MemoryModel()


def problem(
    blocks: Sequence[Block],
    fleet: FleetProfile,
    shape: RequestShape,
    source: NodeId,
    setting: Setting | None = None,
) -> Problem:
    """State the problem; raises InvalidRequestError naming a device and a block kind that was never timed there."""
    chosen = setting or Setting()
    demands = chosen.demands
    declared = {device.node: device.declared for device in fleet.devices}
    return Problem(
        blocks=tuple(_block(block, shape, chosen) for block in blocks),
        devices=tuple(_device(blocks, fleet, device, (shape, source), chosen) for device in fleet.devices),
        links=tuple(_link(link, declared) for link in fleet.links),
        shape=shape,
        objective=chosen.objective,
        source=source,
        pin_first=demands.pin_first,
        pin_last=demands.pin_last,
        pins=demands.pins,
        max_stages=demands.max_stages,
        stages_exactly=demands.stages_exactly,
        exclude=demands.exclude,
        limits=demands.limits,
        residency=demands.residency,
        choose=demands.choose,
        cloud=demands.cloud,
        relay=demands.relays is Relays.ALWAYS,
        relay_if_needed=demands.relays is Relays.IF_NEEDED,
        shared=shared_tensors(blocks),
    )


def missing_kinds(blocks: Sequence[Block], fleet: FleetProfile, node: NodeId) -> tuple[str, ...]:
    """Kinds of block that still need trials on *node*, one of each, in the model's order."""
    device = next(device for device in fleet.devices if device.node == node)
    known = fit(_trials(fleet.devices, device))
    return tuple(dict.fromkeys(block.kind for block in blocks if block.kind not in known))


def shared_tensors(blocks: Sequence[Block]) -> tuple[SharedTensor, ...]:
    """Tensors that more than one block uses, in the order of their first use."""
    uses: dict[tuple[str, int], list[int]] = {}
    for index, block in enumerate(blocks):
        for tensor in block.tensors:
            uses.setdefault((tensor.name, tensor.size_bytes), []).append(index)
    return tuple(SharedTensor(size_bytes=size, blocks=tuple(at)) for (_, size), at in uses.items() if len(at) > 1)


def block_name(block: Block) -> str:
    """The block in the words of the model: its layers, or what it starts from or ends in."""
    layers = sorted(block.kv_layers)
    if layers:
        return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"
    if any(boundary.name == "input_ids" for boundary in block.inputs):
        return "embedding"
    if any(boundary.name == "logits" for boundary in block.outputs):
        return "head"
    return f"block {block.index}"


def _block(block: Block, shape: RequestShape, setting: Setting) -> BlockSpec:
    largest = max((tensor.size_bytes for tensor in block.tensors), default=0)
    demands, memory = setting.demands, setting.memory
    said = _output(block, Codec.RAW if demands.activations_per_cut else demands.activations)
    return BlockSpec(
        name=block_name(block),
        weights_bytes=block.weights_bytes,
        kv_bytes_per_token=block.kv_bytes_per_token,
        output_bytes_per_token=said.bytes_per_token,
        output_bytes_fixed=said.bytes_fixed,
        smaller=tuple(_output(block, codec) for codec in allowed(demands.activations))
        if demands.activations_per_cut
        else (),
        load_peak_bytes=int(memory.load_peak_factor * largest),
        workspace_bytes=memory.workspace_bytes_per_row * min(shape.prefill_chunk_tokens, shape.tokens_in),
    )


def _output(block: Block, codec: Codec) -> OutputBytes:
    return OutputBytes(
        codec=codec,
        bytes_per_token=sum(_written(b.bytes_per_token, b.dtype, codec) for b in block.outputs),
        bytes_fixed=sum(_written(b.bytes_fixed, b.dtype, codec) for b in block.outputs),
    )


def _written(size_bytes: int, dtype: str, activations: Codec) -> int:
    """Bytes on the wire of a row, or of what a step sends besides, that has *size_bytes* in memory."""
    used = applied(activations, dtype)
    width = size_bytes // FLOAT32_BYTES
    return encoded_bytes(used, FLOAT32_BYTES, (1, width)) if used.base is not Codec.RAW and width else size_bytes


def _device(
    blocks: Sequence[Block],
    fleet: FleetProfile,
    device: DeviceProfile,
    asked: tuple[RequestShape, NodeId],
    setting: Setting,
) -> DeviceSpec:
    shape, source = asked
    fits = fit(_trials(fleet.devices, device))
    untimed = any(block.kind not in fits for block in blocks)
    timed = () if untimed and device.node in setting.demands.exclude else blocks
    chunk, factor = shape.prefill_chunk_tokens, device.factor
    prefill_s = {kind: factor * fitted.prefill_s(shape.tokens_in, chunk) for kind, fitted in fits.items()}
    _require_fits(timed, device, fits)

    def decode_s(batch: int) -> tuple[float, ...]:
        per_kind = {kind: factor * fitted.decode_s(mean_context(shape), batch) for kind, fitted in fits.items()}
        return tuple(per_kind[block.kind] for block in timed)

    return DeviceSpec(
        node=device.node,
        memory_budget_bytes=device.memory_budget_bytes,
        memory_promised_bytes=setting.promised_bytes.get(device.node, 0),
        fixed_bytes=setting.memory.fixed_bytes + (_draft_bytes(shape, setting) if device.node == source else 0),
        weights_factor=setting.memory.weights_factor,
        step_overhead_s=factor * device.step_overhead_s,
        decode_s=decode_s(1),
        prefill_s=tuple(prefill_s[block.kind] for block in timed),
        batched=tuple(BatchTimes(batch=size, decode_s=decode_s(size)) for size in batches_timed(device) if timed),
        active_watts=device.declared.watts,
        price_per_hour=device.declared.price_per_hour,
        region=device.declared.region,
        trust=device.declared.trust,
    )


def _draft_bytes(shape: RequestShape, setting: Setting) -> int:
    """What a draft model holds: its weights, and a cache with as many slots as the stage has at most."""
    draft, memory = setting.demands.draft, setting.memory
    if not draft:
        return 0
    twice = sum(tensor.size_bytes * (len(tensor.blocks) - 1) for tensor in shared_tensors(draft))
    weights = math.ceil(memory.weights_factor * (sum(block.weights_bytes for block in draft) - twice))
    positions = max(shape.slots, setting.demands.choose.slots) * shape.context_tokens
    kv = sum(block.kv_bytes_per_token for block in draft) * positions
    return weights + kv + memory.workspace_bytes_per_row * min(shape.prefill_chunk_tokens, shape.tokens_in)


def batches_timed(device: DeviceProfile) -> tuple[int, ...]:
    """Sizes of batches beside one that every kind of block was timed with on *device*."""
    kinds = {trial.kind for trial in device.trials}
    sizes = [{t.batch for t in device.trials if t.kind == kind and t.rows == 1 and t.batch > 1} for kind in kinds]
    return tuple(sorted(set.intersection(*sizes))) if sizes else ()


def mean_context(shape: RequestShape) -> float:
    """Cached positions in the middle of the answer."""
    return min(float(shape.context_tokens), shape.tokens_in + shape.tokens_out / 2)


def _require_fits(blocks: Sequence[Block], device: DeviceProfile, fits: Mapping[str, KindFit]) -> None:
    untimed = next((block for block in blocks if block.kind not in fits), None)
    if untimed:
        raise InvalidRequestError(
            f"{device.node} has no trial of block {untimed.index} ({block_name(untimed)}, kind {untimed.kind[:12]})",
            hint="profile that device with this model, or exclude it",
        )


def _trials(devices: Iterable[DeviceProfile], device: DeviceProfile) -> tuple[BlockTrial, ...]:
    """The device's own trials, and for kinds that it lacks those of a device with an equal fingerprint."""
    own = {trial.kind for trial in device.trials}
    twins = (twin for twin in devices if twin.fingerprint == device.fingerprint and twin.node != device.node)
    lent: dict[str, tuple[BlockTrial, ...]] = {}
    for twin in twins:
        for kind in {trial.kind for trial in twin.trials} - own:
            lent.setdefault(kind, tuple(trial for trial in twin.trials if trial.kind == kind))
    return (*device.trials, *(trial for trials in lent.values() for trial in trials))


def _link(link: LinkProfile, declared: Mapping[NodeId, Declared]) -> LinkSpec:
    return LinkSpec(
        source=link.source,
        target=link.target,
        latency_s=link.latency_s,
        bytes_per_s=link.bytes_per_s / link.factor,
        relayed=link.relayed,
        joules_per_byte=declared[link.source].joules_per_byte if link.source in declared else 0.0,
    )
