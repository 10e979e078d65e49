"""What an agent tells the worker of one shard; what the worker answers is a `ShardReport`."""

import msgspec

from shoal.fleet.report import ShardId
from shoal.ids import Digest, NodeId
from shoal.runtime.settings import Recovery
from shoal.runtime.speculate.speculator import Speculation
from shoal.transport.codec import Codec


class LinkShape(msgspec.Struct, frozen=True, kw_only=True):
    """An emulated link towards *target*: one way."""

    target: NodeId
    latency_s: float
    bytes_per_s: float


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a worker process needs to know at its start; read from its standard input."""

    fleet: str
    node: NodeId
    home: str
    agent_locator: str
    data_listen: str
    shard: ShardId
    stages: int
    manifest: Digest
    start: int
    stop: int
    slots: int
    context_tokens: int
    in_flight: int
    threads: int
    attempt: int = 0
    birth: int = 0
    recovery: Recovery = Recovery.EXACT
    speculation: Speculation = Speculation()
    draft: Digest = Digest("")
    activations: Codec = Codec.RAW
    cache_tokens: int = 0
    slowdown: float = 1.0
    links: tuple[LinkShape, ...] = ()


class Wiring(msgspec.Struct, frozen=True, kw_only=True):
    """Where a worker's frames go."""

    shard: ShardId
    next_node: NodeId
    next_locators: tuple[str, ...]
    next_birth: int = 0
    """Of the worker that listens there."""
    birth: int = 0
    """Of the worker that is told; 0: whoever hears it."""
