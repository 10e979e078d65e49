"""Measured facts of a fleet, as one frozen value per profile epoch."""

import msgspec

from shoal.ids import NodeId


class BlockTrial(msgspec.Struct, frozen=True, kw_only=True):
    """Median time of one block of a kind on one device.

    `rows` new positions in one engine call with `context` positions already in the cache, for each of `batch` sequences.
    """

    kind: str
    rows: int
    batch: int
    context: int
    time_s: float
    spread_s: float
    """Half the distance between the 25th and the 75th percentile."""


class DeviceProfile(msgspec.Struct, frozen=True, kw_only=True):
    """What one node can do.  `fingerprint` names hardware, engine and version: equal fingerprints share trials."""

    node: NodeId
    fingerprint: str
    cores: int
    threads: int
    memory_total_bytes: int
    memory_budget_bytes: int
    """What Shoal may use for shards on this node, before anything is promised."""
    providers: tuple[str, ...] = ()
    trials: tuple[BlockTrial, ...] = ()
    step_overhead_s: float = 0.0
    """Cost of one stage step apart from its blocks: frames, bindings, wake-ups."""
    region: str = ""


class LinkProfile(msgspec.Struct, frozen=True, kw_only=True):
    """One direction of a link.  A round trip is split evenly: no two clocks are compared (ADR 4)."""

    source: NodeId
    target: NodeId
    rtt_p50_s: float
    rtt_p99_s: float
    bytes_per_s: float
    relayed: bool = False
    """Measured through a third node.  Data sessions are direct: no plan may use such a link, and the probe makes none."""

    @property
    def latency_s(self) -> float:
        """One way, for a frame of no bytes."""
        return self.rtt_p50_s / 2


class FleetProfile(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the planner may know about machines and wires."""

    profile_epoch: int
    devices: tuple[DeviceProfile, ...]
    links: tuple[LinkProfile, ...]
