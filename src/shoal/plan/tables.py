"""A problem as arrays, so that a solver's inner loop is a few array operations.

Index order is [device, start, stop] for runs of blocks and [from, to, cut] for hops; infinity marks what is not
allowed.  Every number is that of `cost`, weighted for one request: once for its prompt, tokens out - 1 times for a
decode step.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from shoal.errors import InfeasibleError
from shoal.ids import NodeId
from shoal.plan.cost import (
    TOKEN_BYTES,
    TOKEN_FRAME_BYTES,
    cut_bytes,
    free_bytes,
    kv_positions,
    prefill_rounds,
    prefill_steps,
    transfer_s,
)
from shoal.plan.problem import DeviceSpec, LinkSpec, Problem

Floats = NDArray[np.float64]
Chain = tuple[tuple[int, int, int], ...]
"""Stages as (device index, start, stop)."""

INF = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """What every solver reads; M devices, N blocks."""

    nodes: tuple[NodeId, ...]
    firsts: tuple[int, ...]
    """Devices that may run block 0."""
    closing: int | None
    """The source, when it may run both the first and the last stage."""
    run_s: Floats
    """[M, N+1, N+1] seconds that a request keeps a shard busy; infinite for empty and forbidden ranges."""
    pass_s: Floats
    """[M, N+1, N+1] what a shard adds to a request's latency; less than `run_s` where a prompt's chunks overlap."""
    need_bytes: Floats
    """[M, N+1, N+1]"""
    free_bytes: Floats
    """[M]"""
    hop_s: Floats
    """[M, M, N+1]"""
    wire_s: Floats
    """[M, M, N+1] seconds that a request occupies the link."""
    entry_s: Floats
    """[M] the prompt's ids from the source."""
    return_s: Floats
    """[M first, M last] tokens back to the first stage and to the source."""
    in_flight: int
    max_stages: int
    stages_exactly: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One search of a chain: from *first*, by additive costs."""

    first: int
    start: Floats
    """[N+1] cost of the first stage by its stop."""
    run: Floats
    hop: Floats
    end: Floats
    """[M] cost of ending on a device."""
    close: Floats | None
    """[N+1] cost of a last stage on *first*, by its start; None: *first* runs one stage only."""


def build_tables(problem: Problem) -> Tables:
    """Arrays of a checked problem; excluded devices are left out."""
    devices = [device for device in problem.devices if device.node not in problem.exclude]
    nodes = tuple(device.node for device in devices)
    owners = _owners(problem)
    first, last = owners.get(0), owners.get(len(problem.blocks) - 1)
    wires = {(link.source, link.target): link for link in problem.links}
    hop_s, wire_s = _hops(problem, nodes, wires)
    return Tables(
        nodes=nodes,
        firsts=tuple(range(len(nodes))) if first is None else (nodes.index(first),),
        closing=nodes.index(first) if first is not None and first == last == problem.source else None,
        run_s=np.stack([_run_s(problem, device, owners, prefill_steps(problem.shape)) for device in devices]),
        pass_s=np.stack([_run_s(problem, device, owners, prefill_rounds(problem.shape)) for device in devices]),
        need_bytes=np.stack([_need_bytes(problem, device) for device in devices]),
        free_bytes=np.array([free_bytes(device) for device in devices], dtype=np.float64),
        hop_s=hop_s,
        wire_s=wire_s,
        entry_s=_token_s(
            wires, [(problem.source, node) for node in nodes], TOKEN_FRAME_BYTES + TOKEN_BYTES * problem.shape.tokens_in
        ),
        return_s=_return_s(problem, nodes, wires),
        in_flight=problem.shape.in_flight,
        max_stages=problem.max_stages or len(nodes) + 1,
        stages_exactly=problem.stages_exactly,
    )


def time_passes(tables: Tables, cap_s: float = INF) -> Iterator[Pass]:
    """Searches whose cost is a request's latency; no device or link is kept busy for longer than *cap_s*."""
    fits = (tables.need_bytes <= tables.free_bytes[:, None, None]) & (tables.run_s <= cap_s)
    run = np.where(fits, tables.pass_s, INF)
    hop = np.where(tables.wire_s <= cap_s, tables.hop_s, INF)

    def close(first: int, stop: int) -> Floats:
        need = tables.need_bytes[first, 0, stop] + tables.need_bytes[first, :, -1]
        busy_s = tables.run_s[first, 0, stop] + tables.run_s[first, :, -1]
        return np.where((need <= tables.free_bytes[first]) & (busy_s <= cap_s), tables.pass_s[first, :, -1], INF)

    return _passes(tables, run, hop, (tables.entry_s, tables.return_s), close)


def missing_passes(tables: Tables) -> Iterator[Pass]:
    """Searches whose cost is the bytes by which the stages overflow their devices."""
    need, free = tables.need_bytes, tables.free_bytes[:, None, None]
    run = np.where(np.isfinite(tables.run_s), np.maximum(need - free, 0), INF)

    def close(first: int, stop: int) -> Floats:
        both = need[first, 0, stop] + need[first, :, -1] - tables.free_bytes[first]
        return np.where(np.isfinite(run[first, :, -1]), np.maximum(both, 0) - run[first, 0, stop], INF)

    return _passes(tables, run, _reach(tables.hop_s), (_reach(tables.entry_s), _reach(tables.return_s)), close)


def busy_s(tables: Tables, chain: Chain) -> float:
    """Seconds that one request keeps the chain's busiest device or link occupied."""
    per_device: dict[int, float] = {}
    for device, start, stop in chain:
        per_device[device] = per_device.get(device, 0.0) + float(tables.run_s[device, start, stop])
    wires = [float(tables.wire_s[here[0], there[0], here[2]]) for here, there in pairwise(chain)]
    return max([*per_device.values(), *wires])


def _passes(
    tables: Tables, run: Floats, hop: Floats, ends: tuple[Floats, Floats], close: Callable[[int, int], Floats]
) -> Iterator[Pass]:
    entry, back = ends
    for first in tables.firsts:
        start = entry[first] + run[first, 0]
        if first != tables.closing:
            yield Pass(first=first, start=start, run=run, hop=hop, end=back[first], close=None)
            continue
        yield Pass(first=first, start=_only(start, -1), run=run, hop=hop, end=back[first], close=None)
        for stop in range(1, start.size - 1):
            if np.isfinite(start[stop]):
                never = np.full(len(tables.nodes), INF)
                yield Pass(first=first, start=_only(start, stop), run=run, hop=hop, end=never, close=close(first, stop))


def _only(values: Floats, index: int) -> Floats:
    kept = np.full_like(values, INF)
    kept[index] = values[index]
    return kept


def _reach(values: Floats) -> Floats:
    return np.where(np.isfinite(values), 0.0, INF)


def _owners(problem: Problem) -> dict[int, NodeId]:
    owners = {pin.block: pin.node for pin in problem.pins}
    if problem.pin_first:
        owners[0] = problem.source
    if problem.pin_last:
        owners[len(problem.blocks) - 1] = problem.source
    return owners


def _run_s(problem: Problem, device: DeviceSpec, owners: dict[int, NodeId], rounds: float) -> Floats:
    """Seconds of each range of blocks for *rounds* of the prompt's chunks and all further steps."""
    laps = problem.shape.tokens_out - 1
    overhead_s = device.step_overhead_s * (rounds + laps)
    part = rounds / prefill_steps(problem.shape)
    per_block = part * np.array(device.prefill_s) + laps * np.array(device.decode_s)
    foreign = [block for block, node in owners.items() if node != device.node]
    total = np.full((per_block.size + 1, per_block.size + 1), INF)
    for start in range(per_block.size):
        stop = min((block for block in foreign if block >= start), default=per_block.size)
        total[start, start + 1 : stop + 1] = overhead_s + np.cumsum(per_block[start:stop])
    return total


def _need_bytes(problem: Problem, device: DeviceSpec) -> Floats:
    blocks, positions = problem.blocks, kv_positions(problem.shape)
    total = np.full((len(blocks) + 1, len(blocks) + 1), INF)
    columns = np.array(
        [(b.weights_bytes, b.kv_bytes_per_token * positions, b.workspace_bytes, b.load_peak_bytes) for b in blocks],
        float,
    )
    uses = np.array([[block in tensor.blocks for block in range(len(blocks))] for tensor in problem.shared], int)
    sizes = np.array([tensor.size_bytes for tensor in problem.shared], float)
    for start in range(len(blocks)):
        stored = np.cumsum(columns[start:, 0])
        if sizes.size:
            stored -= sizes @ np.maximum(np.cumsum(uses[:, start:], axis=1) - 1, 0)
        weights = np.ceil(device.weights_factor * stored)
        serving = np.cumsum(columns[start:, 1]) + np.maximum.accumulate(columns[start:, 2])
        peak = np.maximum(serving, np.maximum.accumulate(columns[start:, 3]))
        total[start, start + 1 :] = device.fixed_bytes + weights + peak
    return total


def _hops(
    problem: Problem, nodes: tuple[NodeId, ...], wires: dict[tuple[NodeId, NodeId], LinkSpec]
) -> tuple[Floats, Floats]:
    laps, rounds = problem.shape.tokens_out - 1, prefill_rounds(problem.shape)
    sizes = [cut_bytes(problem, stop) for stop in range(1, len(problem.blocks))]
    prompt_bytes = np.array([0, *(prompt for prompt, _ in sizes), 0], dtype=np.float64)
    answer_bytes = np.array([0, *(laps * row for _, row in sizes), 0], dtype=np.float64)
    delay_bytes = prompt_bytes * (rounds / prefill_steps(problem.shape)) + answer_bytes
    hop_s = np.full((len(nodes), len(nodes), prompt_bytes.size), INF)
    wire_s = hop_s.copy()
    for i, source in enumerate(nodes):
        for j, target in enumerate(nodes):
            if link := wires.get((source, target)):
                wire_s[i, j] = (prompt_bytes + answer_bytes) / link.bytes_per_s
                hop_s[i, j] = delay_bytes / link.bytes_per_s + (rounds + laps) * link.latency_s
    return hop_s, wire_s


def _return_s(problem: Problem, nodes: tuple[NodeId, ...], wires: dict[tuple[NodeId, NodeId], LinkSpec]) -> Floats:
    laps = problem.shape.tokens_out - 1 + prefill_rounds(problem.shape) - 1
    deliver_s = _token_s(wires, [(node, problem.source) for node in nodes], TOKEN_FRAME_BYTES)
    lap_s = np.stack([_token_s(wires, [(last, first) for last in nodes], TOKEN_FRAME_BYTES) for first in nodes])
    return np.where(np.isfinite(lap_s), laps * np.nan_to_num(lap_s, posinf=0.0), INF) + deliver_s


def _token_s(
    wires: dict[tuple[NodeId, NodeId], LinkSpec], pairs: list[tuple[NodeId, NodeId]], payload_bytes: int
) -> Floats:
    def one_s(source: NodeId, target: NodeId) -> float:
        try:
            return transfer_s(wires, source, target, payload_bytes)
        except InfeasibleError:
            return INF

    return np.array([one_s(source, target) for source, target in pairs])
