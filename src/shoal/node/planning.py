"""Plans for the coordinator: gather what is known of model, devices and links, measure the rest, and ask the planner."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import anyio
import anyio.to_thread
import msgspec
from structlog.typing import FilteringBoundLogger

from shoal.clock import Clock
from shoal.errors import NodeUnreachableError, ShoalError, UnavailableError
from shoal.fleet.reconcile import cut_pairs, sources
from shoal.fleet.report import NodeFacts, NodeReport, StepTimes
from shoal.fleet.spec import DeploymentSpec
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.node.calls import Caller
from shoal.node.corrections import Corrections, expected_step_s
from shoal.node.messages import BlocksOf, Links, ModelBlocks, ProbeLinks, ProbeTarget, Profiled, ProfileModel
from shoal.node.wiring import PING_BYTES
from shoal.plan.budget import DeadlineBudget
from shoal.plan.build import Demands, Setting, problem
from shoal.plan.placement import place
from shoal.plan.problem import Answer, Infeasible, Problem
from shoal.profile.fit import KindFit, fit
from shoal.profile.fleet import DeviceProfile, FleetProfile, LinkProfile
from shoal.profile.link import probe_pairs

PROFILE_TIMEOUT_S = 180.0
LINK_TIMEOUT_S = 20.0
"""Per target: to dial it and to time its round trips."""
LINKS_FRESH_S = 300.0
MISSING_FRESH_S = 10.0
"""Until a target that could not be dialled is dialled again: each attempt holds up the plan for seconds."""
FAILED_FRESH_S = 180.0
"""Until a device that could not be measured is measured again: as long as an attempt may take at most, all others waiting."""
PLAN_BUDGET_S = 5.0
NEIGHBOURS = 3


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of probing a link; `link` is None when the target could not be dialled at `locators`."""

    link: LinkProfile | None
    locators: tuple[str, ...]
    at_s: float

    def fresh(self, locators: tuple[str, ...], now_s: float) -> bool:
        """Whether it still counts for a target that is dialled at *locators*."""
        limit_s = LINKS_FRESH_S if self.link else MISSING_FRESH_S
        return self.locators == locators and now_s - self.at_s < limit_s


@dataclass(frozen=True, slots=True)
class Unmeasured:
    """Why the trials of a device came to nothing; a node that was started again may be in better order."""

    error: ShoalError
    incarnation: int
    at_s: float

    def fresh(self, incarnation: int, now_s: float) -> bool:
        """Whether it still counts; a node that did not answer is asked again as soon as one that could not be dialled."""
        limit_s = MISSING_FRESH_S if isinstance(self.error, NodeUnreachableError) else FAILED_FRESH_S
        return self.incarnation == incarnation and now_s - self.at_s < limit_s


@dataclass(slots=True)
class FleetPlanner:
    """Remembers trials by (node, fingerprint, model) and links for a while; measures what is missing."""

    caller: Caller
    clock: Clock
    log: FilteringBoundLogger
    budget_s: float = PLAN_BUDGET_S
    profile_epoch: int = 0
    corrections: Corrections = field(default_factory=Corrections)
    _devices: dict[tuple[NodeId, str, Digest], DeviceProfile] = field(default_factory=dict)
    _fits: dict[tuple[NodeId, str, Digest], dict[str, KindFit]] = field(default_factory=dict)
    """Of those trials, as far as live times were compared with them: a millisecond each, with every heartbeat."""
    _unmeasured: dict[tuple[NodeId, str, Digest], Unmeasured] = field(default_factory=dict)
    _links: dict[tuple[NodeId, NodeId], Measured] = field(default_factory=dict)
    _blocks: dict[Digest, BlocksOf] = field(default_factory=dict)
    _measuring: anyio.Lock = field(default_factory=anyio.Lock)

    async def survey(self, spec: DeploymentSpec, reports: Mapping[NodeId, NodeReport]) -> FleetProfile:
        """What a plan for *spec* must know; a node that cannot be measured is left out with a warning."""
        fleet = without(await self.profile(spec.manifest, spec.source, reports), cut_pairs(reports.values()))
        if spec.source in reports and all(device.node != spec.source for device in fleet.devices):
            raise self._source_unmeasured(reports[spec.source], spec.manifest)
        if spec.source in reports:
            await self._blocks_of(spec.manifest, spec.source)
        return fleet

    def hear(self, report: NodeReport, served: Mapping[DeploymentId, Digest]) -> None:
        """Correct what is known by a heartbeat; *served* are the models behind the names of deployments."""
        self.corrections.hear(report, served, partial(self._expected_step_s, report.facts.fingerprint), self._hello_s)

    def _hello_s(self, pair: tuple[NodeId, NodeId]) -> float | None:
        known = self._links.get(pair)
        link = known.link if known is not None else None
        return link.rtt_p50_s + PING_BYTES / link.bytes_per_s if link is not None else None

    def _expected_step_s(
        self, fingerprint: str, node: NodeId, model: Digest, span: tuple[int, int], times: StepTimes
    ) -> float | None:
        key = (node, fingerprint, model)
        device, known = self._devices.get(key), self._blocks.get(model)
        if device is None or known is None:
            return None
        if key not in self._fits:
            self._fits[key] = fit(device.trials)
        return expected_step_s(device, self._fits[key], [block.kind for block in known.blocks[slice(*span)]], times)

    async def plan(self, spec: DeploymentSpec, surveyed: FleetProfile, promised: Mapping[NodeId, int]) -> Answer:
        """Place *spec* on the surveyed nodes that *promised* names; measures nothing, and so waits for no node."""
        stated = await self.state(spec, surveyed, promised)
        if isinstance(stated, Infeasible):
            return stated
        budget = DeadlineBudget(self.clock.now_s, self.budget_s)
        return await anyio.to_thread.run_sync(partial(place, stated, budget))

    async def state(
        self, spec: DeploymentSpec, surveyed: FleetProfile, promised: Mapping[NodeId, int]
    ) -> Problem | Infeasible:
        """The problem that *spec* poses to the surveyed nodes that *promised* names."""
        fleet = _only(surveyed, promised)
        if all(device.node != spec.source for device in fleet.devices):
            return Infeasible(
                reason=f"source node {spec.source} is not there",
                needed_bytes=0,
                available_bytes=0,
                hint="see `shoal nodes`",
            )
        known = await self._blocks_of(spec.manifest, spec.source)
        demands = Demands(
            pins=spec.pins,
            stages_exactly=spec.stages_exactly,
            exclude=spec.exclude,
            limits=spec.limits,
            residency=spec.residency,
            choose=spec.choose,
            cloud=spec.cloud,
            relays=spec.relays,
            activations=spec.activations,
            activations_per_cut=spec.activations_per_cut,
            draft=(await self._blocks_of(spec.draft, spec.source)).blocks if spec.draft else (),
        )
        setting = Setting(objective=spec.objective, promised_bytes=dict(promised), demands=demands)
        return problem(known.blocks, fleet, spec.shape, spec.source, setting)

    async def profile(
        self, manifest: Digest, source: NodeId, reports: Mapping[NodeId, NodeReport], *, again: bool = False
    ) -> FleetProfile:
        """What these nodes and the links between them can do for this model; measured once, then remembered."""
        # Trials of two models at once would disturb each other; whoever has nothing to measure waits for nobody.
        async with nullcontext() if not again and self._knows(manifest, source, reports) else self._measuring:
            found: dict[NodeId, DeviceProfile] = {}

            async def one(report: NodeReport) -> None:
                asked = sources(manifest, reports, asker=report.node, source=source)
                wanted = ProfileModel(manifest=manifest, sources=asked, again=again)
                device = await self._device(report, wanted)
                if device is not None:
                    found[report.node] = device

            async with anyio.create_task_group() as group:
                for report in reports.values():
                    group.start_soon(one, report)
            targets = {n: probe_target(reports[n]) for n in found}
            links = await self._all_links(targets, source, again=again)
        self.profile_epoch += 1
        measured = FleetProfile(
            profile_epoch=self.profile_epoch, devices=tuple(found[n] for n in sorted(found)), links=tuple(links)
        )
        return self.corrections.corrected(measured, manifest)

    def _knows(self, manifest: Digest, source: NodeId, reports: Mapping[NodeId, NodeReport]) -> bool:
        """Whether nothing is missing that may be had now, and no link stale."""
        measured = {n: r for n, r in reports.items() if (n, r.facts.fingerprint, manifest) in self._devices}
        if any(self._failed(reports[node], manifest) is None for node in reports.keys() - measured.keys()):
            return False
        pairs = probe_pairs(list(measured), source, NEIGHBOURS) if len(measured) > 1 else ()
        known = [pair for pair in pairs if measured.keys() >= set(pair)]
        return all(self._fresh(pair, probe_target(measured[pair[1]])) for pair in known)

    async def _device(self, report: NodeReport, wanted: ProfileModel) -> DeviceProfile | None:
        key = (report.node, report.facts.fingerprint, wanted.manifest)
        if key in self._devices and not wanted.again:
            return with_facts(self._devices[key], report.facts)
        if not wanted.again and self._failed(report, wanted.manifest) is not None:
            return None
        try:
            told = await self.caller.call(report.node, "profile", wanted, Profiled, timeout_s=PROFILE_TIMEOUT_S)
        except ShoalError as error:
            self.log.warning("profile.failed", node=report.facts.name, error=str(error))
            self._unmeasured[key] = Unmeasured(error, report.incarnation, self.clock.now_s())
            return None
        self._unmeasured.pop(key, None)
        self._devices[key] = msgspec.structs.replace(told.device, cached=True)
        self._fits.pop(key, None)
        if not told.device.cached:
            self.corrections.forget_device(report.node, wanted.manifest)
        return with_facts(told.device, report.facts)

    def _failed(self, report: NodeReport, manifest: Digest) -> Unmeasured | None:
        """The failure of this device to be measured that still counts."""
        failed = self._unmeasured.get((report.node, report.facts.fingerprint, manifest))
        return failed if failed is not None and failed.fresh(report.incarnation, self.clock.now_s()) else None

    def _source_unmeasured(self, source: NodeReport, manifest: Digest) -> UnavailableError:
        failed = self._failed(source, manifest)
        why = f": {failed.error.message}" if failed is not None else ""
        return UnavailableError(
            f"source node {source.facts.name} could not be measured{why}",
            hint="its log says more; restart it, or try `shoal profile --refresh`",
        )

    async def _blocks_of(self, manifest: Digest, source: NodeId) -> BlocksOf:
        if manifest not in self._blocks:
            asked = ModelBlocks(manifest=manifest)
            self._blocks[manifest] = await self.caller.call(source, "blocks", asked, BlocksOf, timeout_s=30.0)
        return self._blocks[manifest]

    async def _all_links(
        self, nodes: Mapping[NodeId, ProbeTarget], source: NodeId, *, again: bool
    ) -> list[LinkProfile]:
        # A profile of chosen nodes may be without the source.
        pairs = [pair for pair in probe_pairs(list(nodes), source, NEIGHBOURS) if nodes.keys() >= set(pair)]
        before = dict(self._links)
        stale = [pair for pair in pairs if again or not self._fresh(pair, nodes[pair[1]])]
        for sender in dict.fromkeys(pair[0] for pair in stale):
            # One sender at a time: links of one site often share a medium.
            await self._measure_from(sender, tuple(nodes[target] for node, target in stale if node == sender))
        known = [(self._links[pair], before.get(pair)) for pair in pairs if pair in self._links]
        return [msgspec.structs.replace(now.link, cached=now is then) for now, then in known if now.link is not None]

    async def _measure_from(self, sender: NodeId, targets: Sequence[ProbeTarget]) -> None:
        wanted = ProbeLinks(targets=tuple(targets))
        try:
            told = await self.caller.call(sender, "links", wanted, Links, timeout_s=LINK_TIMEOUT_S * (1 + len(targets)))
        except ShoalError as error:
            self.log.warning("links.failed", node=sender, error=str(error))
            return
        found = {link.target: link for link in told.links}
        for target in targets:
            link = found.get(target.node)
            self._links[sender, target.node] = Measured(link, target.locators, self.clock.now_s())
            self.corrections.forget_link((sender, target.node))
            if link is None:
                self.log.warning("link.missing", node=sender, target=target.node, locators=", ".join(target.locators))

    def _fresh(self, pair: tuple[NodeId, NodeId], target: ProbeTarget) -> bool:
        known = self._links.get(pair)
        if known is None or self.corrections.suspect(pair):
            return False
        return known.fresh(target.locators, self.clock.now_s())

    def links_from(self, node: NodeId) -> list[LinkProfile]:
        """Links measured from *node*, for display."""
        return [known.link for (source, _), known in self._links.items() if source == node and known.link]


def with_facts(device: DeviceProfile, facts: NodeFacts) -> DeviceProfile:
    """The trials of *device*, on a node as its newest report has it: one that was restarted may offer other memory."""
    return msgspec.structs.replace(
        device,
        cores=facts.cores,
        memory_total_bytes=facts.memory_total_bytes,
        memory_budget_bytes=facts.memory_budget_bytes,
        providers=facts.providers,
        declared=facts.declared,
    )


def probe_target(report: NodeReport) -> ProbeTarget:
    """Where the node of *report* is dialled."""
    return ProbeTarget(node=report.node, locators=report.facts.locators, zid=report.facts.zid)


def without(fleet: FleetProfile, cut: frozenset[tuple[NodeId, NodeId]]) -> FleetProfile:
    """*fleet* without the links of these pairs, whatever a probe made of them: agents may relay what stages cannot dial."""
    links = tuple(link for link in fleet.links if (link.source, link.target) not in cut)
    return msgspec.structs.replace(fleet, links=links)


def _only(fleet: FleetProfile, nodes: Collection[NodeId]) -> FleetProfile:
    """*fleet* without what was lost since it was surveyed."""
    return msgspec.structs.replace(
        fleet,
        devices=tuple(d for d in fleet.devices if d.node in nodes),
        links=tuple(link for link in fleet.links if link.source in nodes and link.target in nodes),
    )
