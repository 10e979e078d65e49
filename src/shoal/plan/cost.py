"""The cost model: what a placement takes in seconds, bytes, joules and money.  Planner, preview and live comparison price here.

    time to first token    entry + one chunk through all stages + (chunks - 1) x the time between chunks
    time between chunks    max(busiest device or link by one chunk, one chunk's lap / in flight)
    time per output token  one lap: sum over stages of (decode + transfer) of one step of a micro-batch
    latency                time to first token + (tokens out - 1) laps: phases are weighted by the request, not averaged
    tokens per second      batch x tokens out / period
    period                 max(busiest device, busiest link or medium, (batch x time to first token + further laps) / in flight)
    joules, price          of one request: a device's busy time at its rate, a link's bytes at its own

The transfer after the last stage is the token's: the first one to the source, the others to the first stage.

Tokens per second follow the closed-loop law: a token needs its predecessor, so few streams are bound by the lap, many by the
bottleneck (a timed marked graph's period is the largest delay per token over its circuits).  A micro-batch's prompts run one
after another, its further steps together.  Devices and links are busy for prompts and answers alike.  A link's latency delays a
frame and does not occupy the link; links of one medium take turns.  Frames of token ids (below 1 KB) load no link and cost nothing.

A prompt's chunks follow each other, as many at once as may be in flight; they count as equal.  With one in flight, or one
chunk, this is additive over stages and solvers are exact.  Else they minimise the same with the lap / in flight in place of the
maximum: additive, never above the price of a chain, so that their bound stays one; the plan's gap says what the maximum added.

Memory of a shard: fixed + weights x factor + max(cache + retained outputs + workspace, load peak).  Loading precedes serving, so
the peak and the cache do not add; the engine reuses its workspace from block to block, so the largest counts.  A tensor that
several blocks use (a tied embedding) is held once per shard; two shards of one device are two processes and hold it twice.  Where
relays are allowed, one process without weights passes on what goes through a device, and each shard leaves room for it.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

import msgspec

from shoal.errors import InfeasibleError
from shoal.ids import NodeId
from shoal.model.cache import cache_tokens
from shoal.plan.problem import (
    DeviceSpec,
    Estimate,
    Limits,
    LinkSpec,
    Objective,
    Problem,
    RequestShape,
    Residency,
    Stage,
)

TOKEN_BYTES = 4
TOKEN_FRAME_BYTES = 64
"""A token with its envelope, from the last stage to the first."""
ROUNDING = 1e-9
"""Relative; solvers add the terms of a price in another order than `price` does."""


class Span(msgspec.Struct, frozen=True):
    """Blocks [`start`, `stop`) on *node*; none of them: a relay."""

    node: NodeId
    start: int
    stop: int


Wires = Mapping[tuple[NodeId, NodeId], LinkSpec]


class Priced(msgspec.Struct, frozen=True, kw_only=True):
    """A placement with its figures."""

    stages: tuple[Stage, ...]
    estimate: Estimate


class ShardMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one shard on one device; `total` is the most at any moment."""

    weights: int
    kv: int
    total: int


def wires_of(problem: Problem) -> Wires:
    """Links by their two ends."""
    return {(link.source, link.target): link for link in problem.links}


def price(problem: Problem, spans: Sequence[Span], wires: Wires | None = None) -> Priced:
    """Price the chain *spans*, memory limits and pins aside; raises InfeasibleError when two neighbours have no link.

    Who prices many chains hands in the problem's *wires*.
    """
    wires = wires_of(problem) if wires is None else wires
    hops = [_hop(problem, wires, spans, index) for index in range(len(spans))]
    devices = {device.node: device for device in problem.devices}
    stages = tuple(_stage(problem, devices[span.node], span, hop) for span, hop in zip(spans, hops, strict=True))
    if any(stage.is_relay for stage in stages):
        stages = _in_one_process(stages)
    entry_s = transfer_s(
        wires, problem.source, spans[0].node, TOKEN_FRAME_BYTES + TOKEN_BYTES * problem.shape.tokens_in
    )
    return Priced(stages=stages, estimate=_estimate(problem, wires, stages, entry_s))


def objective_value(objective: Objective, estimate: Estimate) -> float:
    """What a solver minimises: seconds of latency, seconds per token of all streams together, joules or money of a request."""
    match objective:
        case Objective.ENERGY:
            return estimate.joules
        case Objective.PRICE:
            return estimate.price
        case Objective.LATENCY:
            return estimate.latency_s
        case Objective.THROUGHPUT:
            return 1 / estimate.tokens_per_s if estimate.tokens_per_s else 0.0


def meets(limits: Limits, estimate: Estimate) -> bool:
    """Whether figures keep to *limits*; terms are added in several orders, so a billionth more is no breach."""
    return not breaches(limits, estimate)


def breaches(limits: Limits, estimate: Estimate) -> tuple[str, ...]:
    """Names of the limits that figures do not keep to."""
    most = {
        name: limit
        for name in ("latency_s", "time_to_first_token_s", "joules", "price")
        if (limit := getattr(limits, name)) is not None
    }
    found = [name for name, limit in most.items() if getattr(estimate, name) > limit * (1 + ROUNDING)]
    # Tokens that take no time at all have no rate: such a plan states 0 and is slower than nothing.
    if limits.tokens_per_s is not None and 0 < estimate.tokens_per_s < limits.tokens_per_s * (1 - ROUNDING):
        found.append("tokens_per_s")
    return tuple(found)


def shard_memory(problem: Problem, device: DeviceSpec, start: int, stop: int) -> ShardMemory:
    """Bytes of blocks [`start`, `stop`) in a worker on *device*."""
    processes = device.fixed_bytes * (1 + may_relay(problem, device))
    if start == stop:
        return ShardMemory(weights=0, kv=0, total=device.fixed_bytes)
    blocks = problem.blocks[start:stop]
    stored = sum(block.weights_bytes for block in blocks) - repeated_bytes(problem, start, stop)
    weights = math.ceil(device.weights_factor * stored)
    kv = sum(block.kv_bytes_per_token for block in blocks) * kv_positions(problem.shape)
    serving = kv + retained_bytes(problem, stop) + max(block.workspace_bytes for block in blocks)
    total = processes + weights + max(serving, *(block.load_peak_bytes for block in blocks))
    return ShardMemory(weights=weights, kv=kv, total=total)


def may_relay(problem: Problem, device: DeviceSpec) -> bool:
    """Whether frames may pass through *device*: then its shards leave room for the process that relays."""
    return problem.relay and device.fixed_bytes <= free_bytes(device)


def retained_bytes(problem: Problem, stop: int) -> int:
    """What a shard that ends before block *stop* keeps of its outputs; the last one sends token ids only."""
    if not problem.shape.retain_outputs or stop == len(problem.blocks):
        return 0
    return problem.blocks[stop - 1].output_bytes_per_token * kv_positions(problem.shape)


def shard_joules(problem: Problem, device: DeviceSpec, span: Span) -> float:
    """What one request draws above idle on *device* for the blocks of *span*."""
    blocks, shape = slice(span.start, span.stop), problem.shape
    share = (shape.tokens_out - 1) / shape.batch
    prefill_s = sum(device.prefill_s[blocks]) + prefill_steps(shape) * device.step_overhead_s
    decode_s = sum(decode_times(device, shape.batch)[blocks]) + device.step_overhead_s
    return device.active_watts * (prefill_s + share * decode_s)


def battery_joules(device: DeviceSpec) -> float:
    """What all shards of *device* may draw for one request, with what rounding adds; infinite where nothing limits it."""
    return math.inf if device.joules_limit is None else device.joules_limit * (1 + ROUNDING)


def decode_times(device: DeviceSpec, batch: int) -> tuple[float, ...]:
    """Seconds of each block for one step of *batch* sequences.

    Between two batches that were timed it is a straight line; beyond the largest the last line goes on, and where only single
    sequences were timed, several cost as if one after another (an upper bound).
    """
    points = [(1, device.decode_s), *sorted((b.batch, b.decode_s) for b in device.batched)]
    if len(points) == 1 or not device.decode_s:
        return tuple(batch * time_s for time_s in device.decode_s)
    upper = next((i for i, (size, _) in enumerate(points) if size >= batch), len(points) - 1)
    (low, low_s), (high, high_s) = points[max(0, upper - 1)], points[max(1, upper)]
    part = (batch - low) / (high - low)
    return tuple(max(0.0, a + part * (b - a)) for a, b in zip(low_s, high_s, strict=True))


def repeated_bytes(problem: Problem, start: int, stop: int) -> int:
    """Bytes of tensors that blocks [`start`, `stop`) name more than once."""
    uses = ((sum(start <= block < stop for block in tensor.blocks), tensor.size_bytes) for tensor in problem.shared)
    return sum(max(0, count - 1) * size_bytes for count, size_bytes in uses)


def free_bytes(device: DeviceSpec) -> int:
    """What other deployments leave of the device's budget."""
    return max(0, device.memory_budget_bytes - device.memory_promised_bytes)


def kv_positions(shape: RequestShape) -> int:
    """Positions whose keys and values are held at once."""
    return cache_tokens(shape.context_tokens, shape.slots, shape.cache_tokens)


def prefill_steps(shape: RequestShape) -> int:
    """Steps that a prompt takes."""
    return math.ceil(shape.tokens_in / shape.prefill_chunk_tokens)


def prefill_rounds(shape: RequestShape) -> float:
    """How many laps of one chunk a prompt takes at least: all of them one by one, or some at once."""
    return 1 + (prefill_steps(shape) - 1) / shape.in_flight


def cut_bytes(problem: Problem, stop: int) -> tuple[int, int]:
    """Bytes over the cut before block *stop*: of one prompt, and of one decode step of a micro-batch."""
    block, shape = problem.blocks[stop - 1], problem.shape
    prompt = block.output_bytes_per_token * shape.tokens_in + block.output_bytes_fixed * prefill_steps(shape)
    return prompt, block.output_bytes_per_token * shape.batch + block.output_bytes_fixed


def transfer_s(wires: Wires, source: NodeId, target: NodeId, payload_bytes: int) -> float:
    """Until *payload_bytes* have arrived; nothing within a node.  Raises InfeasibleError when there is no link."""
    if source == target:
        return 0.0
    link = wires.get((source, target))
    if link is None:
        raise InfeasibleError(
            f"no link from {source} to {target}", hint="choose nodes that reach each other, or connect them"
        )
    return link.latency_s + payload_bytes / link.bytes_per_s


def _hop(problem: Problem, wires: Wires, spans: Sequence[Span], index: int) -> tuple[float, float]:
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
    decode_s = decode_times(device, problem.shape.batch)
    return Stage(
        node=span.node,
        start=span.start,
        stop=span.stop,
        weights_bytes=memory.weights,
        kv_bytes=memory.kv,
        memory_bytes=memory.total,
        prefill_s=sum(device.prefill_s[blocks]) + prefill_steps(problem.shape) * device.step_overhead_s,
        decode_s=sum(decode_s[blocks]) + device.step_overhead_s,
        send_prefill_s=hop[0],
        send_decode_s=hop[1],
        first_block=problem.blocks[span.start].name if span.start < span.stop else "",
        last_block=problem.blocks[span.stop - 1].name if span.start < span.stop else "",
    )


def _in_one_process(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """*stages* with the memory of each device's relays counted once: not at all beside a shard, which has left room for it."""
    counted = {stage.node for stage in stages if not stage.is_relay}
    found = []
    for stage in stages:
        again = stage.is_relay and stage.node in counted
        found.append(msgspec.structs.replace(stage, memory_bytes=0) if again else stage)
        counted.add(stage.node)
    return tuple(found)


def _estimate(problem: Problem, wires: Wires, stages: Sequence[Stage], entry_s: float) -> Estimate:
    shape = problem.shape
    first_s = entry_s + _prompt_s(problem, wires, stages)
    lap_s = sum(stage.decode_s + stage.send_decode_s for stage in stages)
    laps = shape.tokens_out - 1
    busiest_s = bottleneck_s(problem, wires, stages, (shape.batch, laps))
    period_s = max(busiest_s, (shape.batch * first_s + laps * lap_s) / shape.in_flight)
    joules, money = _charges(problem, wires, stages)
    return Estimate(
        time_to_first_token_s=first_s,
        time_per_output_token_s=lap_s,
        tokens_per_s=shape.batch * shape.tokens_out / period_s if period_s else 0.0,
        latency_s=first_s + laps * lap_s,
        joules=joules,
        price=money,
    )


def _charges(problem: Problem, wires: Wires, stages: Sequence[Stage]) -> tuple[float, float]:
    """Joules and money of one request; a step of a micro-batch is shared by its sequences."""
    devices = {device.node: device for device in problem.devices}
    share = (problem.shape.tokens_out - 1) / problem.shape.batch
    joules = money = 0.0
    for stage in stages:
        busy_s = stage.prefill_s + share * stage.decode_s
        joules += devices[stage.node].active_watts * busy_s
        money += devices[stage.node].price_per_hour / 3600 * busy_s
    for here, there in pairwise(stages):
        prompt_bytes, row_bytes = cut_bytes(problem, here.stop)
        link, sent = wires[here.node, there.node], prompt_bytes + share * row_bytes
        joules += link.joules_per_byte * sent
        money += link.price_per_byte * sent
    return joules, money


def _prompt_s(problem: Problem, wires: Wires, stages: Sequence[Stage]) -> float:
    """From the prompt's ids at the first stage to the first token at the source."""
    chunks, last = prefill_steps(problem.shape), stages[-1]
    delay_s = sum(wires[here.node, there.node].latency_s for here, there in pairwise(stages))
    work_s = sum(s.prefill_s for s in stages) + sum(s.send_prefill_s for s in stages[:-1]) - delay_s
    through_s = work_s / chunks + delay_s
    busiest_s = bottleneck_s(problem, wires, stages, (1, 0)) / chunks
    between_s = max(busiest_s, (through_s + last.send_decode_s) / problem.shape.in_flight)
    return through_s + (chunks - 1) * between_s + last.send_prefill_s


def bottleneck_s(
    problem: Problem,
    wires: Wires,
    stages: Sequence[Stage],
    work: tuple[int, int],
) -> float:
    """Seconds that *work*, prompts and further steps, keeps the busiest device, link or medium occupied."""
    return max(busy_times(problem, wires, stages, work).values())


def busy_times(
    problem: Problem,
    wires: Wires,
    stages: Sequence[Stage],
    work: tuple[int, int],
) -> dict[object, float]:
    """Seconds that *work*, prompts and further steps, keeps each device, link or medium occupied."""
    prompts, laps = work
    busy_s: defaultdict[object, float] = defaultdict(float)
    for stage in stages:
        busy_s[stage.node] += prompts * stage.prefill_s + laps * stage.decode_s
    for here, there in pairwise(stages):
        prompt_bytes, row_bytes = cut_bytes(problem, here.stop)
        link = wires[here.node, there.node]
        sent = prompts * prompt_bytes + laps * row_bytes
        busy_s[occupied(link)] += sent / link.bytes_per_s
    return busy_s


def occupied(link: LinkSpec) -> object:
    """What a frame on this link keeps others from: its medium, or this direction of the link alone."""
    return ("medium", link.medium) if link.medium else (link.source, link.target)


def prompts_counted(problem: Problem) -> int:
    """How many prompts a solver's additive cost counts: a micro-batch's for throughput, that of one request else."""
    return problem.shape.batch if problem.objective is Objective.THROUGHPUT else 1


def owners(problem: Problem) -> dict[int, NodeId]:
    """Blocks that belong on one device, by pins and by the rules for the first and the last."""
    found = {pin.block: pin.node for pin in problem.pins}
    if problem.pin_first:
        found[0] = problem.source
    if problem.pin_last:
        found[len(problem.blocks) - 1] = problem.source
    return found


def barred(problem: Problem) -> dict[NodeId, str]:
    """Devices that may neither hold a block nor relay, and why."""
    found = dict.fromkeys(problem.exclude, "excluded by request")
    for device in problem.devices:
        if said := foreign(problem.residency, device.region, device.trust):
            found.setdefault(device.node, said)
    return found


def foreign(rule: Residency, region: str, trust: str) -> str:
    """Why activations may not enter a place of this region and trust; empty where they may."""
    for what, name, allowed in (("region", region, rule.regions), ("trust", trust, rule.trusts)):
        if allowed and name not in allowed:
            said = f"{what} {name}" if name else f"a device that names no {what}"
            return f"activations may not enter {said}, only {', '.join(allowed)}"
    return ""
