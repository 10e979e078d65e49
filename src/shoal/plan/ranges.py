"""What each range of blocks costs on each device: seconds, bytes, and whether it may run there.

Index order is [device, start, stop].  Ranges are priced from running sums, all at once; infinity marks what is empty or not
allowed, except in `alone_s`, which is multiplied by rates that may be 0.
"""

from math import isfinite

import numpy as np

from shoal.ids import NodeId
from shoal.plan.arrays import INF, Flags, Floats
from shoal.plan.cost import battery_joules, decode_times, kv_positions, may_relay, prefill_steps, retained_bytes
from shoal.plan.problem import DeviceSpec, Problem


def laps(problem: Problem) -> int:
    """Steps of a request behind its prompt."""
    return problem.shape.tokens_out - 1


def allowed_s(problem: Problem, devices: list[DeviceSpec], owned: dict[int, NodeId], rounds: float) -> Floats:
    """Seconds of each shard for *rounds* of a prompt's chunks and all further steps; infinite where it may not be."""
    seconds = _run(problem, devices, rounds, laps(problem))
    seconds[~_may_run(problem, devices, owned)] = INF
    return seconds


def _run(problem: Problem, devices: list[DeviceSpec], rounds: float, further: float) -> Floats:
    """[M, N+1, N+1] seconds of each range of blocks; infinite where it is empty."""
    part = rounds / prefill_steps(problem.shape)
    prefill = np.array([device.prefill_s for device in devices])
    decode = np.array([decode_times(device, problem.shape.batch) for device in devices])
    overhead = (rounds + further) * np.array([device.step_overhead_s for device in devices])
    before = np.zeros((len(devices), len(problem.blocks) + 1))
    np.cumsum(part * prefill + further * decode, axis=1, out=before[:, 1:])
    total = before[:, None, :] - before[:, :, None] + overhead[:, None, None]
    total[:, ~_ahead(len(problem.blocks))] = INF
    return np.asarray(total)


def _ahead(blocks: int) -> Flags:
    """[N+1, N+1] ranges that are not empty."""
    return np.triu(np.ones((blocks + 1, blocks + 1), bool), 1)


def _may_run(problem: Problem, devices: list[DeviceSpec], owned: dict[int, NodeId]) -> Flags:
    """[M, N+1, N+1] whether pins and the devices' batteries allow a range of blocks."""
    blocks = len(problem.blocks)
    allowed = np.ones((len(devices), blocks + 1, blocks + 1), bool)
    for block, owner in owned.items():
        others = [index for index, device in enumerate(devices) if device.node != owner]
        allowed[others, : block + 1, block + 1 :] = False
    for index, device in enumerate(devices):
        if isfinite(battery_joules(device)):
            allowed[index] &= _drawn_joules(problem, device) <= battery_joules(device)
    return allowed


def _drawn_joules(problem: Problem, device: DeviceSpec) -> Floats:
    """[N+1, N+1] of one request, 0 for empty ranges.

    Not from running sums: the little that a difference of two large ones is off may be much of a small shard.
    """
    blocks, share = len(problem.blocks), laps(problem) / problem.shape.batch
    overhead_s = (prefill_steps(problem.shape) + share) * device.step_overhead_s
    each_s = np.array(device.prefill_s) + share * np.array(decode_times(device, problem.shape.batch))
    drawn = np.zeros((blocks + 1, blocks + 1))
    for start in range(blocks):
        drawn[start, start + 1 :] = device.active_watts * (overhead_s + np.cumsum(each_s[start:]))
    return drawn


def alone_s(problem: Problem, devices: list[DeviceSpec]) -> Floats:
    """[M, N+1, N+1] seconds that one request alone keeps a shard busy: its prompt, and its share of each further step.

    0 for empty ranges.
    """
    if not devices:
        return np.zeros((0, len(problem.blocks) + 1, len(problem.blocks) + 1))
    seconds = _run(problem, devices, prefill_steps(problem.shape), laps(problem) / problem.shape.batch)
    return np.where(np.isfinite(seconds), seconds, 0.0)


def need_bytes(problem: Problem, devices: list[DeviceSpec]) -> Floats:
    """[M, N+1, N+1]; devices differ only in what a process takes and in how they pack weights."""
    stored, peak = _shard_bytes(problem)
    processes = np.array([device.fixed_bytes * (1 + may_relay(problem, device)) for device in devices], float)
    factor = np.array([device.weights_factor for device in devices])
    need = processes[:, None, None] + np.ceil(factor[:, None, None] * stored) + peak
    need[:, ~_ahead(len(problem.blocks))] = INF
    return np.asarray(need)


def _shard_bytes(problem: Problem) -> tuple[Floats, Floats]:
    """[N+1, N+1] weights as stored, and the most beside them, of each range of blocks."""
    blocks, positions = problem.blocks, kv_positions(problem.shape)
    stored = np.zeros((len(blocks) + 1, len(blocks) + 1))
    peak = stored.copy()
    columns = np.array(
        [(b.weights_bytes, b.kv_bytes_per_token * positions, b.workspace_bytes, b.load_peak_bytes) for b in blocks],
        float,
    )
    retained = np.array([retained_bytes(problem, stop) for stop in range(1, len(blocks) + 1)], float)
    uses = np.array([[block in tensor.blocks for block in range(len(blocks))] for tensor in problem.shared], int)
    sizes = np.array([tensor.size_bytes for tensor in problem.shared], float)
    for start in range(len(blocks)):
        kept = np.cumsum(columns[start:, 0])
        if sizes.size:
            kept -= sizes @ np.maximum(np.cumsum(uses[:, start:], axis=1) - 1, 0)
        serving = np.cumsum(columns[start:, 1]) + np.maximum.accumulate(columns[start:, 2]) + retained[start:]
        stored[start, start + 1 :] = kept
        peak[start, start + 1 :] = np.maximum(serving, np.maximum.accumulate(columns[start:, 3]))
    return stored, peak
