"""The cost model: what a placement takes in seconds and bytes.  Planner, preview and live comparison all price here.

    time to first token    entry + one chunk through all stages + (chunks - 1) x the time between chunks
    time between chunks    max(busiest device or link by one chunk, one chunk's lap / in flight)
    time per output token  one lap: sum over stages of (decode + transfer of one row)
    latency                time to first token + (tokens out - 1) laps: phases are weighted by the request, not averaged
    tokens per second      tokens out / period, period = max(busiest device, busiest link, latency / in flight)

The transfer after the last stage is the token's: the first one to the source, the others to the first stage.

Tokens per second follow the closed-loop law: a token needs its predecessor, so few streams are bound by the lap, many by the
bottleneck (a timed marked graph's period is the largest delay per token over its circuits).  Devices and links are
busy for a request's prompt and answer alike.  A link's latency delays a frame and does not occupy the link.  Frames
of token ids (below 1 KB) load no link.

A prompt's chunks follow each other, as many at once as may be in flight; they count as equal.  With one in flight, or one
chunk, this is additive over stages and solvers are exact.  Else they minimise the same with the lap / in flight in place of the
maximum: additive, never above the price of a chain, so that their bound stays one; the plan's gap says what the maximum added.

Memory of a shard: fixed + weights x factor + max(cache + workspace, load peak).  Loading precedes serving, so the
peak and the cache do not add; the engine reuses its workspace from block to block, so the largest counts.  A tensor that
several blocks use (a tied embedding) is held once per shard; two shards of one device are two processes and hold it twice.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import msgspec

from shoal.errors import InfeasibleError
from shoal.ids import NodeId
from shoal.plan.problem import DeviceSpec, Estimate, LinkSpec, Objective, Problem, RequestShape, Stage

TOKEN_BYTES = 4
TOKEN_FRAME_BYTES = 64
"""A token with its envelope, from the last stage to the first."""


class Span(msgspec.Struct, frozen=True):
    """Blocks [`start`, `stop`) on *node*."""

    node: NodeId
    start: int
    stop: int


class Priced(msgspec.Struct, frozen=True, kw_only=True):
    """A placement with its figures."""

    stages: tuple[Stage, ...]
    estimate: Estimate


class ShardMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one shard on one device; `total` is the most at any moment."""

    weights: int
    kv: int
    total: int


def price(problem: Problem, spans: Sequence[Span]) -> Priced:
    """Price the chain *spans*, memory limits and pins aside; raises InfeasibleError when two neighbours have no link."""
    wires = {(link.source, link.target): link for link in problem.links}
    hops = [_hop(problem, wires, spans, index) for index in range(len(spans))]
    devices = {device.node: device for device in problem.devices}
    stages = tuple(_stage(problem, devices[span.node], span, hop) for span, hop in zip(spans, hops, strict=True))
    entry_s = transfer_s(
        wires, problem.source, spans[0].node, TOKEN_FRAME_BYTES + TOKEN_BYTES * problem.shape.tokens_in
    )
    return Priced(stages=stages, estimate=_estimate(problem, wires, stages, entry_s))


def objective_value(objective: Objective, estimate: Estimate) -> float:
    """What a solver minimises: seconds of latency, or seconds per token of all streams together."""
    match objective:
        case Objective.LATENCY:
            return estimate.latency_s
        case Objective.THROUGHPUT:
            return 1 / estimate.tokens_per_s if estimate.tokens_per_s else 0.0


def shard_memory(problem: Problem, device: DeviceSpec, start: int, stop: int) -> ShardMemory:
    """Bytes of blocks [`start`, `stop`) in a worker on *device*."""
    blocks = problem.blocks[start:stop]
    stored = sum(block.weights_bytes for block in blocks) - repeated_bytes(problem, start, stop)
    weights = math.ceil(device.weights_factor * stored)
    kv = sum(block.kv_bytes_per_token for block in blocks) * kv_positions(problem.shape)
    serving = kv + max(block.workspace_bytes for block in blocks)
    total = device.fixed_bytes + weights + max(serving, *(block.load_peak_bytes for block in blocks))
    return ShardMemory(weights=weights, kv=kv, total=total)


def repeated_bytes(problem: Problem, start: int, stop: int) -> int:
    """Bytes of tensors that blocks [`start`, `stop`) name more than once."""
    uses = ((sum(start <= block < stop for block in tensor.blocks), tensor.size_bytes) for tensor in problem.shared)
    return sum(max(0, count - 1) * size_bytes for count, size_bytes in uses)


def free_bytes(device: DeviceSpec) -> int:
    """What other deployments leave of the device's budget."""
    return max(0, device.memory_budget_bytes - device.memory_promised_bytes)


def kv_positions(shape: RequestShape) -> int:
    """Positions whose keys and values are held at once."""
    return shape.context_tokens * shape.slots


def prefill_steps(shape: RequestShape) -> int:
    """Steps that a prompt takes."""
    return math.ceil(shape.tokens_in / shape.prefill_chunk_tokens)


def prefill_rounds(shape: RequestShape) -> float:
    """How many laps of one chunk a prompt takes at least: all of them one by one, or some at once."""
    return 1 + (prefill_steps(shape) - 1) / shape.in_flight


def cut_bytes(problem: Problem, stop: int) -> tuple[int, int]:
    """Bytes over the cut before block *stop*: of the whole prompt, and of one decode step."""
    block, shape = problem.blocks[stop - 1], problem.shape
    prompt = block.output_bytes_per_token * shape.tokens_in + block.output_bytes_fixed * prefill_steps(shape)
    return prompt, block.output_bytes_per_token + block.output_bytes_fixed


def transfer_s(
    wires: dict[tuple[NodeId, NodeId], LinkSpec], source: NodeId, target: NodeId, payload_bytes: int
) -> float:
    """Until *payload_bytes* have arrived; nothing within a node.  Raises InfeasibleError when there is no link."""
    if source == target:
        return 0.0
    link = wires.get((source, target))
    if link is None:
        raise InfeasibleError(
            f"no link from {source} to {target}", hint="choose nodes that reach each other, or connect them"
        )
    return link.latency_s + payload_bytes / link.bytes_per_s


def _hop(
    problem: Problem, wires: dict[tuple[NodeId, NodeId], LinkSpec], spans: Sequence[Span], index: int
) -> tuple[float, float]:
    here = spans[index]
    if index + 1 == len(spans):
        deliver_s = transfer_s(wires, here.node, problem.source, TOKEN_FRAME_BYTES)
        return deliver_s, transfer_s(wires, here.node, spans[0].node, TOKEN_FRAME_BYTES)
    prompt_bytes, row_bytes = cut_bytes(problem, here.stop)
    there = spans[index + 1].node
    return transfer_s(wires, here.node, there, prompt_bytes), transfer_s(wires, here.node, there, row_bytes)


def _stage(problem: Problem, device: DeviceSpec, span: Span, hop: tuple[float, float]) -> Stage:
    memory = shard_memory(problem, device, span.start, span.stop)
    blocks = slice(span.start, span.stop)
    return Stage(
        node=span.node,
        start=span.start,
        stop=span.stop,
        weights_bytes=memory.weights,
        kv_bytes=memory.kv,
        memory_bytes=memory.total,
        prefill_s=sum(device.prefill_s[blocks]) + prefill_steps(problem.shape) * device.step_overhead_s,
        decode_s=sum(device.decode_s[blocks]) + device.step_overhead_s,
        send_prefill_s=hop[0],
        send_decode_s=hop[1],
        first_block=problem.blocks[span.start].name,
        last_block=problem.blocks[span.stop - 1].name,
    )


def _estimate(
    problem: Problem, wires: dict[tuple[NodeId, NodeId], LinkSpec], stages: Sequence[Stage], entry_s: float
) -> Estimate:
    shape = problem.shape
    first_s = entry_s + _prompt_s(problem, wires, stages)
    lap_s = sum(stage.decode_s + stage.send_decode_s for stage in stages)
    latency_s = first_s + (shape.tokens_out - 1) * lap_s
    period_s = max(bottleneck_s(problem, wires, stages, shape.tokens_out - 1), latency_s / shape.in_flight)
    return Estimate(
        time_to_first_token_s=first_s,
        time_per_output_token_s=lap_s,
        tokens_per_s=shape.tokens_out / period_s if period_s else 0.0,
        latency_s=latency_s,
    )


def _prompt_s(problem: Problem, wires: dict[tuple[NodeId, NodeId], LinkSpec], stages: Sequence[Stage]) -> float:
    """From the prompt's ids at the first stage to the first token at the source."""
    chunks, last = prefill_steps(problem.shape), stages[-1]
    delay_s = sum(wires[here.node, there.node].latency_s for here, there in pairwise(stages))
    work_s = sum(s.prefill_s for s in stages) + sum(s.send_prefill_s for s in stages[:-1]) - delay_s
    through_s = work_s / chunks + delay_s
    busiest_s = bottleneck_s(problem, wires, stages, 0) / chunks
    between_s = max(busiest_s, (through_s + last.send_decode_s) / problem.shape.in_flight)
    return through_s + (chunks - 1) * between_s + last.send_prefill_s


def bottleneck_s(
    problem: Problem, wires: dict[tuple[NodeId, NodeId], LinkSpec], stages: Sequence[Stage], laps: int
) -> float:
    """Seconds that a prompt and *laps* further steps keep the busiest device or link occupied."""
    busy_s: defaultdict[tuple[NodeId, NodeId], float] = defaultdict(float)
    for stage in stages:
        busy_s[stage.node, stage.node] += stage.prefill_s + laps * stage.decode_s
    for here, there in pairwise(stages):
        prompt_bytes, row_bytes = cut_bytes(problem, here.stop)
        busy_s[here.node, there.node] += (prompt_bytes + laps * row_bytes) / wires[here.node, there.node].bytes_per_s
    return max(busy_s.values())
