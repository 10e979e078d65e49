"""Corrections of profiles by what live stages report: one place that hears every report of the fleet, beside the planner.

A stage's steps are compared with what the profile of its device predicts for its blocks; the way to the next stage with what it
took just after it was wired, or just after its link was measured anew: else what the new profile knows would count twice.  A way
that is far from the profile from the start is measured anew: its link has changed since, while nobody used it.

What is learned of a device goes for the model that was served, and for others until they are served there themselves.  It is
forgotten when the node was restarted or is measured anew; a link's when it is.

Whoever plans finds the factors in the next profile, and people are told of a change (`told`).  A link that changed is measured
anew for it, which takes a second and tells bandwidth from latency; a device is not, for it serves.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from shoal.fleet.report import NodeReport, ShardId, ShardReport, StepTimes
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.node.live_times import PINGS
from shoal.profile.drift import HOP_FLOOR_S, STEP_FLOOR_S, Drift, corrected_rtt_s, observe, ratio
from shoal.profile.fit import KindFit
from shoal.profile.fleet import DeviceProfile, FleetProfile, LinkProfile

StageTime = Callable[[NodeId, Digest, tuple[int, int], StepTimes], float | None]
"""What the uncorrected profile says of one step of these blocks on that node; None where it is not known."""
HopTime = Callable[["Pair"], float | None]
"""What the uncorrected profile says of a hello to there and back; None where it is not known."""
Pair = tuple[NodeId, NodeId]
OTHERWISE = 2.0
"""A way is far from the profile by so much: half or twice.  A probe and a stage do not greet in quite the same way."""


class ProfileChanged(msgspec.Struct, frozen=True, kw_only=True):
    """A device, or its link to *target*, takes *factor* times as long as it was measured to."""

    node: NodeId
    target: NodeId | None = None
    factor: float

    def __str__(self) -> str:
        where = f"the link from {self.node} to {self.target}" if self.target else f"the engine of {self.node}"
        return f"{where} now takes {self.factor:.2f} times as long as it was measured to"


def ignore(_: ProfileChanged) -> None:
    """Tell nobody."""


class _Way(msgspec.Struct, frozen=True, kw_only=True):
    """A stage's way to the next one."""

    target: NodeId
    wired_s: float
    """`base_s` of its reports: another one says that it was wired anew."""
    base_s: float | None
    """What its hellos are compared with; None until enough of them left after the link was measured."""
    counted: int = 0
    """Hellos so far."""
    fresh_from: int = 0
    """So many hellos, and the newest all left after the link was measured."""


@dataclass(slots=True)
class Corrections:
    """Belongs to the event loop."""

    told: Callable[[ProfileChanged], None] = ignore
    _devices: dict[NodeId, dict[Digest, Drift]] = field(default_factory=dict)
    _measured: dict[tuple[NodeId, Digest], dict[Digest, float]] = field(default_factory=dict)
    """What samples of other models said of a device when it was measured with this one: its trials know that already."""
    _links: dict[Pair, Drift] = field(default_factory=dict)
    _suspect: set[Pair] = field(default_factory=set)
    _steps: dict[NodeId, dict[ShardId, int]] = field(default_factory=dict)
    """Newest steps that were counted of a node's shards."""
    _ways: dict[NodeId, dict[ShardId, _Way]] = field(default_factory=dict)
    _lives: dict[NodeId, int] = field(default_factory=dict)

    def hear(
        self, report: NodeReport, served: Mapping[DeploymentId, Digest], predicted: StageTime, hello: HopTime
    ) -> None:
        """Learn from a heartbeat; *served* are the models behind the names of deployments."""
        if self._lives.get(report.node, report.incarnation) != report.incarnation:
            self.forget_device(report.node)
        self._lives[report.node] = report.incarnation
        steps, ways = self._steps.get(report.node, {}), self._ways.get(report.node, {})
        self._steps[report.node] = {s.shard: s.step_times.until for s in report.shards if s.step_times is not None}
        for shard in report.shards:
            if self._steps[report.node].get(shard.shard) != steps.get(shard.shard):
                self._learn_steps(report.node, shard, served.get(shard.shard.deployment), predicted)
        found = {s.shard: self._learn_hop(report.node, s, ways.get(s.shard), hello) for s in report.shards}
        self._ways[report.node] = {shard: way for shard, way in found.items() if way is not None}

    def corrected(self, fleet: FleetProfile, model: Digest) -> FleetProfile:
        """*fleet* with what is known by now; what was measured is left beside it."""
        return msgspec.structs.replace(
            fleet,
            devices=tuple(msgspec.structs.replace(d, factor=self.device_factor(d.node, model)) for d in fleet.devices),
            links=tuple(self._link(link) for link in fleet.links),
        )

    def device_factor(self, node: NodeId, model: Digest) -> float:
        """What the times of *model* on *node* are to be multiplied by; 1 while nothing is known."""
        known = self._devices.get(node, {})
        if model in known:
            return known[model].factor
        other = max(known, key=lambda served: known[served].samples, default=None)
        if other is None:
            return 1.0
        before = self._measured.get((node, model), {}).get(other, 0.0)
        return msgspec.structs.replace(known[other], used=known[other].used - before).factor

    def suspect(self, pair: Pair) -> bool:
        """Whether this link has changed since it was measured."""
        return pair in self._suspect

    def forget_device(self, node: NodeId, model: Digest | None = None) -> None:
        """It is another machine by now, or was measured anew (with *model* alone)."""
        if model is None:
            self._devices.pop(node, None)
            self._measured = {key: means for key, means in self._measured.items() if key[0] != node}
            return
        known = self._devices.get(node, {})
        known.pop(model, None)
        for (there, _), means in self._measured.items():
            if there == node:
                means.pop(model, None)
        self._measured[node, model] = {other: drift.used for other, drift in known.items()}

    def forget_link(self, pair: Pair) -> None:
        """It was measured anew: hellos that left before say nothing more, and later ones are compared with the first of them."""
        self._links.pop(pair, None)
        self._suspect.discard(pair)
        ways = self._ways.get(pair[0], {})
        for shard, way in ways.items():
            if way.target == pair[1]:  # one hello may be on its way to us
                ways[shard] = msgspec.structs.replace(way, base_s=None, fresh_from=way.counted + PINGS + 1)

    def _learn_steps(self, node: NodeId, shard: ShardReport, model: Digest | None, predicted: StageTime) -> None:
        times = shard.step_times
        if times is None or model is None:
            return
        expected_s = predicted(node, model, (shard.start, shard.stop), times)
        if expected_s is None:
            return
        known = self._devices.setdefault(node, {})
        before = known.get(model, Drift())
        known[model] = now = observe(before, ratio(times.time_s, expected_s, STEP_FLOOR_S))
        if now.changes != before.changes:
            self.told(ProfileChanged(node=node, factor=now.factor))

    def _learn_hop(self, node: NodeId, shard: ShardReport, way: _Way | None, hello: HopTime) -> _Way | None:
        """Take the newest hellos of *shard*, whose *way* was known so far; what is known of it now."""
        times, target = shard.hop_times, shard.next_node
        if times is None or target is None:
            return None
        if way is None or (way.target, way.wired_s) != (target, times.base_s):
            way = _Way(target=target, wired_s=times.base_s, base_s=times.base_s)
            self._compare((node, target), times.base_s, hello((node, target)))
        if times.until == way.counted:
            return way
        if way.base_s is not None:
            self._learn_link((node, target), ratio(times.rtt_s, way.base_s, HOP_FLOOR_S))
            return msgspec.structs.replace(way, counted=times.until)
        base_s = times.rtt_s if times.until >= way.fresh_from else None
        return msgspec.structs.replace(way, counted=times.until, base_s=base_s)

    def _compare(self, pair: Pair, base_s: float, measured_s: float | None) -> None:
        """Suspect a link on which a new way is nothing like what was measured."""
        off = 1.0 if measured_s is None else ratio(base_s, measured_s, HOP_FLOOR_S)
        if not 1 / OTHERWISE < off < OTHERWISE:
            self._suspect |= {pair, pair[::-1]}
            self.told(ProfileChanged(node=pair[0], target=pair[1], factor=off))

    def _learn_link(self, pair: Pair, sample: float) -> None:
        before = self._links.get(pair, Drift())
        self._links[pair] = now = observe(before, sample)
        if now.changes != before.changes:
            self._suspect |= {pair, pair[::-1]}  # a hello went both ways
            self.told(ProfileChanged(node=pair[0], target=pair[1], factor=now.factor))

    def _link(self, link: LinkProfile) -> LinkProfile:
        drift = self._links.get((link.source, link.target))
        if drift is None:
            return link
        return msgspec.structs.replace(link, factor=corrected_rtt_s(link.rtt_p50_s, drift.factor) / link.rtt_p50_s)


def expected_step_s(
    device: DeviceProfile, fits: Mapping[str, KindFit], kinds: Sequence[str], times: StepTimes
) -> float | None:
    """What *device*, whose trials give *fits*, was measured to take for one engine call over blocks of these kinds.

    None where one was not timed.
    """
    if any(kind not in fits for kind in kinds):
        return None
    call_s = max(0.0, device.step_overhead_s - device.loop_overhead_s)
    return call_s + sum(fits[kind].decode_s(times.context, times.batch) for kind in kinds)
