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


class Declared(msgspec.Struct, frozen=True, kw_only=True):
    """What a node's owner says of it: nothing here is measured, and nothing checks it."""

    watts: float = 0.0
    """Above idle while its engine works; 0: unknown, and counted as nothing."""
    price_per_hour: float = 0.0
    """Of busy time, in one currency for the whole fleet."""
    joules_per_byte: float = 0.0
    """Of frames that it sends, both ends together."""
    region: str = ""
    trust: str = ""


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
    """Cost of one stage step apart from its blocks: the engine's call, and the stage's own loop."""
    loop_overhead_s: float = 0.0
    """The loop's part of it: frames, scheduling, sampling, wake-ups."""
    trials_took_s: float = 0.0
    """Seconds of loading and timing that the trials cost when they were made; 0 when that was not noted."""
    cached: bool = False
    """The trials were made before and kept; nothing was timed for this profile."""
    declared: Declared = Declared()
    factor: float = 1.0
    """Live steps take this many times as long as the trials say; trials and overhead are as they were measured."""


class LinkProfile(msgspec.Struct, frozen=True, kw_only=True):
    """One direction of a link.  A round trip is split evenly: no two clocks are compared (ADR 4).

    The payload went this way and a few bytes came back, so that the bandwidth is this direction's.
    """

    source: NodeId
    target: NodeId
    rtt_p50_s: float
    rtt_p99_s: float
    bytes_per_s: float
    relayed: bool = False
    """Measured through a third node.  Data sessions are direct: no plan may use such a link, and the probe makes none."""
    jitter_s: float = 0.0
    """Half of the small round trips are within this of the median one (median absolute deviation)."""
    round_trips: int = 0
    """Small ones that were timed; the 99th percentile of fewer than 100 is close to the longest."""
    probe_s: float = 0.0
    """What measuring it took, dialling included."""
    cached: bool = False
    """Measured for an earlier profile, a few minutes ago at most."""
    factor: float = 1.0
    """Frames take this many times as long by now; the figures are as they were measured."""

    @property
    def latency_s(self) -> float:
        """One way, for a frame of no bytes, by now."""
        return self.factor * self.rtt_p50_s / 2


class FleetProfile(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the planner may know about machines and wires."""

    profile_epoch: int
    devices: tuple[DeviceProfile, ...]
    links: tuple[LinkProfile, ...]
