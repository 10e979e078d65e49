"""What crosses between devices: a request's activations over each cut, its prompt and its tokens at both ends of a chain.

Index order is [from, to, cut]; infinity marks where no link joins two devices.
"""

from dataclasses import dataclass

import numpy as np

from shoal.ids import NodeId
from shoal.plan.arrays import INF, Floats
from shoal.plan.cost import (
    TOKEN_BYTES,
    TOKEN_FRAME_BYTES,
    cut_bytes,
    prefill_rounds,
    prefill_steps,
    prompts_counted,
)
from shoal.plan.problem import DeviceSpec, LinkSpec, Problem
from shoal.plan.ranges import laps


@dataclass(frozen=True, slots=True, kw_only=True)
class Hops:
    """Direct links; `sent` [N+1] are the bytes of one request over each cut, the rest is as in `Tables`."""

    hop_s: Floats
    wire_s: Floats
    sent: Floats
    links: tuple[tuple[LinkSpec | None, ...], ...]
    token_s: Floats
    """[M, M] a token with its envelope; nothing within a device."""


def hops_of(problem: Problem, devices: list[DeviceSpec]) -> Hops:
    """What a request costs on the direct links between *devices*."""
    further, prompts = laps(problem), prompts_counted(problem)
    rounds = prompts * prefill_rounds(problem.shape)
    sizes = [cut_bytes(problem, stop) for stop in range(1, len(problem.blocks))]
    prompt_bytes = np.array([0, *(prompt for prompt, _ in sizes), 0], dtype=np.float64)
    row_bytes = np.array([0, *(row for _, row in sizes), 0], dtype=np.float64)
    delay_bytes = prompt_bytes * (rounds / prefill_steps(problem.shape)) + further * row_bytes
    index = {device.node: place for place, device in enumerate(devices)}
    links: list[list[LinkSpec | None]] = [[None] * len(devices) for _ in devices]
    latency_s, rate = np.full((len(devices), len(devices)), INF), np.ones((len(devices), len(devices)))
    for link in problem.links:
        if link.source in index and link.target in index:
            here, there = index[link.source], index[link.target]
            links[here][there] = link
            latency_s[here, there], rate[here, there] = link.latency_s, link.bytes_per_s
    wire_s = (prompts * prompt_bytes + further * row_bytes) / rate[:, :, None]
    wire_s[~np.isfinite(latency_s)] = INF
    hop_s = delay_bytes / rate[:, :, None]
    hop_s += ((rounds + further) * latency_s)[:, :, None]  # in place: a large fleet's is 60 MB
    return Hops(
        hop_s=hop_s,
        wire_s=wire_s,
        sent=prompt_bytes + further / problem.shape.batch * row_bytes,
        links=tuple(tuple(row) for row in links),
        token_s=np.where(np.eye(len(devices), dtype=bool), 0.0, latency_s + TOKEN_FRAME_BYTES / rate),
    )


def entry_s(problem: Problem, nodes: tuple[NodeId, ...]) -> Floats:
    """[M] the prompt's ids from the source."""
    wires = {link.target: link for link in problem.links if link.source == problem.source}
    ids_bytes = TOKEN_FRAME_BYTES + TOKEN_BYTES * problem.shape.tokens_in
    return prompts_counted(problem) * np.array([_token_s(problem, node, wires.get(node), ids_bytes) for node in nodes])


def return_s(problem: Problem, nodes: tuple[NodeId, ...], hops: Hops) -> Floats:
    """[M first, M last] tokens back to the first stage and to the source."""
    prompts = prompts_counted(problem)
    rounds = laps(problem) + prompts * (prefill_rounds(problem.shape) - 1)
    wires = {link.source: link for link in problem.links if link.target == problem.source}
    deliver_s = prompts * np.array([_token_s(problem, node, wires.get(node), TOKEN_FRAME_BYTES) for node in nodes])
    lap_s = hops.token_s.T
    return np.asarray(np.where(np.isfinite(lap_s), rounds * np.nan_to_num(lap_s, posinf=0.0), INF) + deliver_s)


def _token_s(problem: Problem, node: NodeId, link: LinkSpec | None, payload_bytes: int) -> float:
    """Between *node* and the source; infinite where no link joins them."""
    if node == problem.source:
        return 0.0
    return link.latency_s + payload_bytes / link.bytes_per_s if link else INF
