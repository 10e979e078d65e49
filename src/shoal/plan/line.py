"""A chain of shards as the line of servers that its frames pass: the simulator's reading of a problem.

A device and a link's direction (or the medium that several links share) each serve one frame at a time.  A device keeps a frame
for its blocks and the step overhead, a link for its bytes; a link's latency then delays the frame and occupies nothing.  A relay
is a process of its own, which does not wait until a step of its device's shard is over: it works at once, and what it takes the
device's next frame lacks.  Token ids are frames like others, of 64 bytes.

This file and `shoal.plan.simulate` know no formula of the cost model, whose judge they are: what both must agree on is what
`shoal.plan.problem` says about its fields.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

from shoal.errors import InfeasibleError, InvalidRequestError
from shoal.ids import NodeId
from shoal.plan.problem import DeviceSpec, LinkSpec, Problem

ENVELOPE_BYTES = 64
"""A frame of token ids: from the last stage, and around a prompt's ids."""
ID_BYTES = 4

_FOREIGN = "simulate the plan with the problem that it was made for"


class Shard(Protocol):
    """Blocks [start, stop) on a node; none of them: a relay.  Stages of a plan are such."""

    @property
    def node(self) -> NodeId: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...


class Hop(NamedTuple):
    """A visit to a server: it is occupied for `service_s`; the frame is at the next one `delay_s` later.

    Frames of one lane (a stage, a link's direction) do not overtake each other.
    """

    server: int
    lane: int
    service_s: float
    delay_s: float
    at_once: bool = False
    """Without waiting for the server: a relay."""


Route = tuple[Hop, ...]


class Line(NamedTuple):
    """Servers by number, and the ways of frames through them."""

    devices: dict[int, str]
    links: dict[int, str]
    lanes: int
    enter: Route
    """A prompt's ids, from the source to the first stage."""
    chunks: tuple[Route, ...]
    """A prompt, step by step, through all stages."""
    step: Route
    """A micro-batch's step through all stages."""
    feed: Route
    """A token from the last stage to the first."""
    deliver: Route | None
    """A token from the last stage to the source; None when `feed` leads there."""


def build_line(problem: Problem, shards: Sequence[Shard]) -> Line:
    """The line of *shards*; raises InvalidRequestError when they are no chain of the problem, InfeasibleError without a link."""
    check_chain(problem, shards)
    ways = _Ways(problem)
    shape, first, last = problem.shape, shards[0].node, shards[-1].node
    sizes = [min(shape.prefill_chunk_tokens, shape.tokens_in - at) for at in _chunk_starts(problem)]
    stepping = {shard.node: step_times(ways.devices[shard.node], shape.batch) for shard in shards}
    prompting = {shard.node: ways.devices[shard.node].prefill_s for shard in shards}
    ids_bytes = ENVELOPE_BYTES + ID_BYTES * shape.tokens_in
    return Line(
        enter=ways.send(problem.source, first, ids_bytes),
        chunks=tuple(ways.through(shards, prompting, rows / shape.tokens_in, rows) for rows in sizes),
        step=ways.through(shards, stepping, 1.0, shape.batch),
        feed=ways.send(last, first, ENVELOPE_BYTES),
        deliver=None if first == problem.source else ways.send(last, problem.source, ENVELOPE_BYTES),
        devices=ways.named(ways.stops),
        links=ways.named(ways.wires),
        lanes=len(ways.lanes),
    )


def check_chain(problem: Problem, shards: Sequence[Shard]) -> None:
    """Raise InvalidRequestError when *shards* are not all blocks of *problem*, in order, on devices that have times for them."""
    timed = {device.node: bool(device.decode_s and device.prefill_s) for device in problem.devices}
    blocks, at = len(problem.blocks), 0
    for number, shard in enumerate(shards, 1):
        if not timed.get(shard.node, False):
            said = "has no block times in the problem" if shard.node in timed else "is no device of the problem"
            raise InvalidRequestError(f"stage {number} runs on {shard.node}, which {said}", hint=_FOREIGN)
        if shard.start != at or not at <= shard.stop <= blocks:
            raise InvalidRequestError(
                f"stage {number} has blocks [{shard.start}, {shard.stop}), where [{at}, ...) of {blocks} should follow",
                hint=_FOREIGN,
            )
        at = shard.stop
    if not shards or at != blocks or shards[0].start == shards[0].stop:
        raise InvalidRequestError(f"the stages run {at} of {blocks} blocks, and the first must run some", hint=_FOREIGN)


def step_times(device: DeviceSpec, batch: int) -> Sequence[float]:
    """Seconds of each block for a step of *batch* sequences: lines between batches that were timed, the last one goes on."""
    known = {1: device.decode_s} | {timed.batch: timed.decode_s for timed in device.batched}
    if batch in known:
        return known[batch]
    if len(known) == 1:
        return [batch * time_s for time_s in device.decode_s]
    sizes = sorted(known)
    above = next((size for size in sizes if size > batch), sizes[-1])
    below = sizes[sizes.index(above) - 1]
    weight = (batch - below) / (above - below)
    return [max(0.0, (1 - weight) * a + weight * b) for a, b in zip(known[below], known[above], strict=True)]


def _chunk_starts(problem: Problem) -> range:
    return range(0, problem.shape.tokens_in, problem.shape.prefill_chunk_tokens)


class _Ways:
    """Numbers servers and lanes as routes come to use them."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.devices = {device.node: device for device in problem.devices}
        self.found = {(link.source, link.target): link for link in problem.links}
        self.stops: dict[str, int] = {}
        self.wires: dict[str, int] = {}
        self.lanes: dict[tuple[str, str], int] = {}

    def named(self, servers: dict[str, int]) -> dict[int, str]:
        return {number: name for name, number in servers.items()}

    def through(
        self, shards: Sequence[Shard], times: Mapping[NodeId, Sequence[float]], share: float, rows: int
    ) -> Route:
        """All stages and the links between them, for a frame of *rows* rows that takes *share* of *times*."""
        hops: list[Hop] = []
        for shard, after in pairwise([*shards, None]):
            assert shard is not None
            busy_s = share * sum(times[shard.node][shard.start : shard.stop])
            hops.append(self._work(shard, busy_s + self.devices[shard.node].step_overhead_s))
            if after is not None:
                cut = self.problem.blocks[shard.stop - 1]
                hops += self.send(shard.node, after.node, cut.output_bytes_per_token * rows + cut.output_bytes_fixed)
        return tuple(hops)

    def send(self, source: NodeId, target: NodeId, payload_bytes: int) -> Route:
        """From node to node; nowhere when they are one."""
        if source == target:
            return ()
        link = self.found.get((source, target))
        if link is None:
            raise InfeasibleError(
                f"no link from {source} to {target}",
                hint="choose stages on nodes that reach each other, or add the link",
            )
        name = f"medium {link.medium}" if link.medium else f"{source} to {target}"
        return (
            Hop(self._number(self.wires, name), self._lane(link), payload_bytes / link.bytes_per_s, link.latency_s),
        )

    def _work(self, shard: Shard, busy_s: float) -> Hop:
        lane = self.lanes.setdefault((shard.node, f"{shard.start}"), len(self.lanes))
        server = self._number(self.stops, shard.node)
        return Hop(server, lane, busy_s, 0.0, at_once=shard.start == shard.stop)

    def _number(self, servers: dict[str, int], name: str) -> int:
        return servers.setdefault(name, len(self.stops) + len(self.wires))

    def _lane(self, link: LinkSpec) -> int:
        return self.lanes.setdefault((link.source, link.target), len(self.lanes))
