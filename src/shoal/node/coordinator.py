"""The coordinator's loop: heartbeats in, a plan per deployment, orders out (ADR 5).

A role, not a machine: every node that may coordinate runs this object, and it acts only while it holds the lease.  The lease is
the broadcast of the view itself; a standby that has not heard it for `LEASE_S` takes the next fencing epoch and continues from
the last view, and whoever hears a higher epoch than its own steps down.
"""

import heapq
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import anyio
import anyio.abc
import anyio.to_thread
import msgspec

from shoal.clock import Clock
from shoal.errors import InvalidRequestError, NodeUnreachableError, ShoalError, UnknownModelError
from shoal.fleet.order import Refused, Reply
from shoal.fleet.reconcile import Addressed, Phase, broken, heard, missing_orders, phase, promised_bytes
from shoal.fleet.report import NodeReport
from shoal.fleet.spec import DeploymentSpec
from shoal.fleet.state import (
    LOST_AFTER_S,
    Deployment,
    DeploymentDropped,
    DeploymentWanted,
    FleetState,
    NodeForgotten,
    NodeHeard,
    NodeVanished,
    PlanMade,
    Standing,
    apply,
    drained,
    standing,
)
from shoal.fleet.view import LEASE_S, CoordinatorView, DeploymentStatus, Lease
from shoal.ids import DeploymentId, NodeId
from shoal.node.journal import Journal
from shoal.node.last_plan import recall
from shoal.plan.problem import Answer, Infeasible, Plan
from shoal.profile.fleet import FleetProfile

TICK_S = 0.1
VIEW_EVERY_S = 0.5
FORGET_AFTER_S = 600.0
RETRY_PLAN_S = 2.0
RETRY_PLAN_AT_MOST_S = 120.0
RETRY_DISK_S = 2.0
"""Until the journal is asked again that did not take a record."""


class _Peer(msgspec.Struct, frozen=True, kw_only=True):
    node: NodeId


class Planner(Protocol):
    """Makes a plan for a deployment on the nodes that are heard; measures what it does not know yet."""

    async def survey(self, spec: DeploymentSpec, reports: Mapping[NodeId, NodeReport]) -> FleetProfile:
        """What a plan must know of these nodes; may take minutes.  Raises ShoalError when something could not be measured."""
        ...

    async def plan(self, spec: DeploymentSpec, surveyed: FleetProfile, promised: Mapping[NodeId, int]) -> Answer:
        """A plan on the surveyed nodes that *promised* names with the bytes that are not to be had there; takes seconds."""
        ...


class Note(Protocol):
    """Where the coordinator writes what happened; see `events`."""

    def __call__(
        self, kind: str, text: str, *, node: NodeId | None = None, deployment: DeploymentId | None = None
    ) -> None: ...


SendOrder = Callable[[Addressed], Awaitable[Reply]]
Broadcast = Callable[[CoordinatorView], None]


@dataclass(slots=True)
class Coordinator:
    """Owns the fleet's state while it holds the lease; everything runs on the event loop."""

    me: NodeId
    journal: Journal
    clock: Clock
    planner: Planner
    send_order: SendOrder
    broadcast: Broadcast
    note: Note
    begin_log: Callable[[int], None]
    """Told the fencing epoch of a lease before the first event under it is noted."""
    eager: bool
    """Takes a lease that nobody holds at once; a standby waits."""
    tick_s: float = TICK_S
    state: FleetState = field(default_factory=FleetState)
    lease: Lease | None = None
    _view: CoordinatorView | None = None
    _view_heard_s: float = 0.0
    _leads_since_s: float = 0.0
    _heard_holder: bool = False
    _peer: NodeId | None = None
    """Another node that may coordinate: it may have taken over while we were away."""
    _peer_kept: bool = True
    _disk_rests_until_s: float = float("-inf")
    _sequence: int = 0
    _planning: set[DeploymentId] = field(default_factory=set)
    _refused_until_s: dict[DeploymentId, float] = field(default_factory=dict)
    _ordered: dict[tuple[NodeId, str], float] = field(default_factory=dict)
    _standings: dict[NodeId, Standing] = field(default_factory=dict)
    _phases: dict[DeploymentId, Phase] = field(default_factory=dict)
    _vain_plans: dict[DeploymentId, int] = field(default_factory=dict)
    """Plans in a row that never came to serve."""
    _one_plan: anyio.Lock = field(default_factory=anyio.Lock)
    """Two plans at once would both count on the same free memory.  Nobody measures under it: that would hold up a recovery."""

    @property
    def leading(self) -> bool:
        """Whether this node holds the lease, as far as it knows."""
        return self.lease is not None

    def hear_report(self, report: NodeReport) -> None:
        """A heartbeat of any node, this one included."""
        self.state = apply(self.state, NodeHeard(report=report, at_s=self.clock.now_s()))
        if report.facts.coordinates and report.node != self.me and self._peer is None:
            self._peer, self._peer_kept = report.node, False

    def hear_vanished(self, node: NodeId, incarnation: int) -> None:
        """The fabric's hint that a node's process, or its link, has ended."""
        self.state = apply(self.state, NodeVanished(node=node, incarnation=incarnation, at_s=self.clock.now_s()))

    def hear_view(self, view: CoordinatorView) -> None:
        """A broadcast of whoever holds the lease; a higher epoch than ours ends ours."""
        if view.newer_than(self._view):
            self._view = view
            self._view_heard_s = self.clock.now_s()
            self._heard_holder = True
        if self.lease is not None and view.lease.rank > self.lease.rank:
            self.note("coordinator.stepped_down", f"lease {view.lease.fencing_epoch} is newer", node=view.lease.holder)
            self.lease = None

    async def want(self, spec: DeploymentSpec, previewed: Plan | None = None) -> None:
        """Declare a deployment; durable before it returns.

        What is wanted already, and would be placed as it is (*previewed*), stays as it is: nothing is loaded again.
        """
        self._must_lead()
        name = spec.deployment
        old = self.state.deployments.get(name)
        if old is not None and self._stands(old, spec, previewed):
            return
        # Never a number of a deployment that was dropped: a plan made for that one must not count for this one.
        generation = await self._number("generation", above=old.spec.generation if old else 0)
        spec = msgspec.structs.replace(spec, generation=generation)
        self.state = apply(self.state, DeploymentWanted(spec=spec))
        self._refused_until_s.pop(name, None)
        self._vain_plans.pop(name, None)
        await self._remember(self.state.deployments[name])
        self.show()

    async def drop(self, name: DeploymentId) -> None:
        """Stop a deployment; raises UnknownModelError when there is none of that name."""
        self._must_lead()
        old = self.state.deployments.get(name)
        if old is None:
            raise UnknownModelError(f"no deployment is named {name!r}", hint="`shoal ps` lists them")
        # State first: a plan that is being made now must not write the record again after its removal.
        self.state = apply(self.state, DeploymentDropped(deployment=name, generation=old.spec.generation))
        for kept in (self._refused_until_s, self._vain_plans, self._phases):
            kept.pop(name, None)
        await anyio.to_thread.run_sync(lambda: self.journal.remove("deployment", name))
        self.show()

    async def preview(self, spec: DeploymentSpec) -> Answer:
        """The plan that *spec* would get now; nothing is loaded."""
        return await self._place(spec, await self._survey(spec))

    async def _survey(self, spec: DeploymentSpec) -> FleetProfile:
        """A suspect node is given the time to speak again or be lost: a plan without it would be made anew a moment later."""
        for _ in range(int(LOST_AFTER_S / TICK_S) + 1):
            if all(standing(m, self.clock.now_s()) is not Standing.SUSPECT for m in self.state.members.values()):
                break
            await anyio.sleep(self.tick_s)
        source = self.state.members.get(spec.source)
        if source is not None and standing(source, self.clock.now_s()) is Standing.SUSPECT:
            # Not "there is no plan": that would refuse requests for good, and unload what still answers.
            raise NodeUnreachableError(
                f"source node {source.report.facts.name} has not been heard for a moment", hint="try again"
            )
        return await self.planner.survey(spec, self._usable())

    async def _place(self, spec: DeploymentSpec, surveyed: FleetProfile) -> Answer:
        # Surveyed nodes that are silent for a moment count; only those that are lost by now, or leave, do not.
        staying = [r for r in heard(self.state, self.clock.now_s()).values() if not r.leaving]
        promised = promised_bytes(staying, self.state.deployments.values(), spec.deployment)
        answer = await self.planner.plan(spec, surveyed, promised)
        if isinstance(answer, Infeasible):
            return msgspec.structs.replace(answer, reason=self._named(answer.reason), hint=self._named(answer.hint))
        return answer

    def view(self) -> CoordinatorView | None:
        """The newest view, ours or heard; None before the first."""
        return self._view

    def nodes(self) -> dict[NodeId, tuple[NodeReport, Standing, float]]:
        """Every member with its standing and the seconds since it was heard."""
        now_s = self.clock.now_s()
        return {n: (m.report, standing(m, now_s), now_s - m.heard_s) for n, m in self.state.members.items()}

    async def run(self) -> None:
        """Tick until cancelled."""
        self._view_heard_s = self.clock.now_s()
        self._view = self._view or recall(self.journal)
        self._peer = next((peer.node for peer in self.journal.all("peer", _Peer)), None)
        kept = {d.spec.deployment: d for d in self.journal.all("deployment", Deployment)}
        self.state = msgspec.structs.replace(self.state, deployments={**kept, **self.state.deployments})
        shown_s = float("-inf")
        async with anyio.create_task_group() as group:
            while True:
                now_s = self.clock.now_s()
                await self._write(now_s)
                if self.lease is not None:
                    self._watch_members(now_s)
                    for deployment in self._to_plan(now_s):
                        self._planning.add(deployment.spec.deployment)
                        group.start_soon(self._replan, deployment)
                    self._order(now_s, group)
                    if now_s - shown_s >= VIEW_EVERY_S or self._another_phase(now_s):
                        # At once when something changed: no gateway should send a request to a plan that drains.
                        self.show()
                        shown_s = now_s
                await anyio.sleep(self.tick_s)

    def show(self) -> None:
        """Broadcast the view; does nothing without the lease, or while nodes are still gathering."""
        if self.lease is None or self._gathering():
            return
        reports = heard(self.state, self.clock.now_s())
        self._sequence += 1
        statuses = tuple(self._status(d, reports) for d in self.state.deployments.values())
        self._view = CoordinatorView(lease=self.lease, sequence=self._sequence, deployments=statuses)
        self._view_heard_s = self.clock.now_s()
        self._note_phases(self._view)
        self.broadcast(self._view)

    async def _write(self, now_s: float) -> None:
        """What is due and must be on disk before it counts: another coordinator that was heard of, and a lease of our own.

        A disk that is full delays both, and ends nothing.
        """
        if now_s < self._disk_rests_until_s:
            return
        try:
            if self._peer is not None and not self._peer_kept:
                peer = _Peer(node=self._peer)
                await anyio.to_thread.run_sync(lambda: self.journal.put("peer", peer.node, peer))
                self._peer_kept = True
            if self.lease is None:
                await self._maybe_lead(now_s)
        except ShoalError as error:
            self._disk_rests_until_s = now_s + RETRY_DISK_S
            self.note("coordinator.not_written", error.message, node=self.me)

    async def _maybe_lead(self, now_s: float) -> None:
        silent_s = now_s - self._view_heard_s
        nobody_else = not self._heard_holder and self._peer is None
        if silent_s < LEASE_S and not (self.eager and nobody_else):
            return
        known = self._view.lease.fencing_epoch if self._view is not None else 0
        epoch = await self._number("fencing", above=known)  # the other holder's were taken from its own journal
        if self._view is not None and self._view.lease.holder != self.me:
            await self._take_over(self._view)
        self.lease, self._leads_since_s = Lease(holder=self.me, fencing_epoch=epoch), now_s
        self.begin_log(epoch)
        self.note("coordinator.leads", f"lease {epoch}", node=self.me)
        self.show()

    async def _take_over(self, view: CoordinatorView) -> None:
        """What the last holder wanted is wanted now, and what it dropped stays dropped, whatever we knew before."""
        theirs = {status.deployment.spec.deployment: status.deployment for status in view.deployments}
        for gone in self.state.deployments.keys() - theirs.keys():
            await anyio.to_thread.run_sync(self.journal.remove, "deployment", gone)
        for deployment in theirs.values():
            await self._remember(deployment)
        self.state = msgspec.structs.replace(self.state, deployments=theirs)

    def _gathering(self) -> bool:
        """Whether nodes of a plan may still be on their way to us: whoever has just started has heard nobody yet.

        Nothing is planned anew and nothing is said meanwhile, or each restart of a coordinator would break what works.
        """
        plans = [d.answer for d in self.state.deployments.values() if isinstance(d.answer, Plan)]
        unheard = any(stage.node not in self.state.members for plan in plans for stage in plan.stages)
        return unheard and self.clock.now_s() - self._leads_since_s < LEASE_S

    def _status(self, deployment: Deployment, reports: Mapping[NodeId, NodeReport]) -> DeploymentStatus:
        gone = drained(self.state, deployment.spec.deployment)
        reason = self._named(broken(deployment, reports, drained=gone))
        match deployment.answer:
            case Infeasible() as infeasible:
                reason = f"{infeasible.reason}; {infeasible.hint}" if infeasible.hint else infeasible.reason
            case Plan() | None:
                pass
        source = reports.get(deployment.spec.source)
        return DeploymentStatus(
            deployment=deployment,
            phase=phase(deployment, reports, drained=gone),
            reason=reason,
            gateway=source.facts.gateway if source is not None else "",
        )

    def _watch_members(self, now_s: float) -> None:
        for node, member in self.state.members.items():
            now = standing(member, now_s)
            if self._standings.get(node) is not now:
                self.note(f"node.{now.value}", member.report.facts.name, node=node)
                if now is Standing.ALIVE and self._standings.get(node) is not Standing.SUSPECT:
                    # It has come, or come back: what had no place may have one now.
                    self._refused_until_s.clear()
                    self._vain_plans.clear()
                self._standings[node] = now
            if now_s - member.heard_s > (LOST_AFTER_S if member.report.leaving else FORGET_AFTER_S):
                forgotten = NodeForgotten(node=node, incarnation=member.report.incarnation)
                self.state = apply(self.state, forgotten)

    def _another_phase(self, now_s: float) -> bool:
        reports, state = heard(self.state, now_s), self.state
        now = {n: phase(d, reports, drained=drained(state, n)) for n, d in state.deployments.items()}
        return any(self._phases.get(name) is not found for name, found in now.items())

    def _usable(self) -> dict[NodeId, NodeReport]:
        now_s = self.clock.now_s()
        return {n: m.report for n, m in self.state.members.items() if standing(m, now_s) is Standing.ALIVE}

    def _to_plan(self, now_s: float) -> list[Deployment]:
        if self._gathering():
            return []
        reports = heard(self.state, now_s)
        found = []
        for name, deployment in self.state.deployments.items():
            if name in self._planning or now_s < self._refused_until_s.get(name, 0.0):
                continue
            match phase(deployment, reports, drained=drained(self.state, name)):
                case Phase.PLANNING | Phase.RECOVERING | Phase.REFUSED:
                    found.append(deployment)
                case Phase.LOADING | Phase.SERVING | Phase.DRAINING:
                    pass
        return found

    async def _replan(self, deployment: Deployment) -> None:
        name = deployment.spec.deployment
        try:
            surveyed = await self._survey(deployment.spec)
            async with self._one_plan:
                await self._plan_anew(deployment.spec, surveyed)
        except ShoalError as error:
            self._failed(name, error.message)
        except Exception as error:  # noqa: BLE001 a fault in planning one model must not end the service of the others
            self._failed(name, f"{type(error).__name__}: {error}")
        finally:
            self._refused_until_s[name] = self.clock.now_s() + self._patience_s(name)
            self._planning.discard(name)

    async def _plan_anew(self, spec: DeploymentSpec, surveyed: FleetProfile) -> None:
        name = spec.deployment
        answer = await self._place(spec, surveyed)
        current = self.state.deployments.get(name)
        if self.lease is None or current is None or current.spec.generation != spec.generation:
            return
        if isinstance(answer, Infeasible) and current.answer == answer:
            return
        if isinstance(current.answer, Plan) and self._sound(current):
            return  # what it lacked has come back in the meantime
        epoch = await self._number("plan", above=self._highest_plan_epoch())
        if self.state.deployments.get(name) is not current:
            return
        made = PlanMade(deployment=name, plan_epoch=epoch, answer=answer, at_s=self.clock.now_s())
        self.state = apply(self.state, made)
        self._vain_plans[name] = self._vain_plans.get(name, -1) + 1
        self.note("plan.made", self._named(describe_answer(answer)), deployment=name)
        await self._remember(self.state.deployments[name])
        self.show()

    def _failed(self, name: DeploymentId, why: str) -> None:
        self._vain_plans[name] = self._vain_plans.get(name, -1) + 1
        self.note("plan.failed", self._named(why), deployment=name)

    def _patience_s(self, name: DeploymentId) -> float:
        """How long until the next plan: what fails as soon as it is loaded is tried ever more rarely."""
        return min(RETRY_PLAN_S * 2.0 ** min(self._vain_plans.get(name, 0), 16), RETRY_PLAN_AT_MOST_S)

    def _highest_plan_epoch(self) -> int:
        """Shards are known by deployment and plan epoch: no epoch may come twice, also after a drop or a takeover."""
        made = [deployment.plan_epoch for deployment in self.state.deployments.values()]
        held = [s.shard.plan_epoch for m in self.state.members.values() for s in m.report.shards]
        return max([0, *made, *held])

    async def _number(self, name: str, *, above: int) -> int:
        return await anyio.to_thread.run_sync(lambda: self.journal.next_number(name, above=above))

    def _stands(self, old: Deployment, spec: DeploymentSpec, previewed: Plan | None) -> bool:
        """Whether *spec* asks for nothing but what *old* is, placed as it is now and in good order."""
        same = msgspec.structs.replace(spec, generation=old.spec.generation) == old.spec
        plan = old.answer
        if not same or previewed is None or not isinstance(plan, Plan):
            return False
        return self._sound(old) and _places(plan) == _places(previewed)

    def _sound(self, deployment: Deployment) -> bool:
        reports = heard(self.state, self.clock.now_s())
        return not broken(deployment, reports, drained=drained(self.state, deployment.spec.deployment))

    async def _remember(self, deployment: Deployment) -> None:
        name = deployment.spec.deployment
        await anyio.to_thread.run_sync(lambda: self.journal.put("deployment", name, deployment))

    def _order(self, now_s: float, group: anyio.abc.TaskGroup) -> None:
        """Send what is due; nobody waits here for a node that does not answer."""
        if self.lease is None:
            return
        for addressed in missing_orders(self.state, self.lease.fencing_epoch, now_s):
            key = (addressed.node, f"{type(addressed.order).__name__} {addressed.order.shard}")
            if now_s >= self._ordered.get(key, 0.0):
                self._ordered[key] = now_s + VIEW_EVERY_S
                group.start_soon(self._send, addressed)
        if len(self._ordered) > 1000:
            keep = heapq.nlargest(500, self._ordered.items(), key=lambda item: item[1])
            self._ordered = dict(keep)

    async def _send(self, addressed: Addressed) -> None:
        try:
            reply = await self.send_order(addressed)
        except ShoalError:
            return  # lost, or refused by a node of another version: its reports say what it does; the order is given again
        if isinstance(reply, Refused) and self.lease is not None and reply.fencing_epoch > self.lease.fencing_epoch:
            self.note("coordinator.fenced", f"lease {reply.fencing_epoch} is newer", node=addressed.node)
            self.lease = None

    def _note_phases(self, view: CoordinatorView) -> None:
        for status in view.deployments:
            name = status.deployment.spec.deployment
            if status.phase is Phase.SERVING:
                self._vain_plans.pop(name, None)
            if self._phases.get(name) is not status.phase:
                self.note(f"deployment.{status.phase.value}", status.reason or "as planned", deployment=name)
                self._phases[name] = status.phase

    def _named(self, text: str) -> str:
        """*text* with names for node ids: an id is 32 characters that nobody reads."""
        for node, member in self.state.members.items():
            text = text.replace(node, member.report.facts.name)
        return text

    def _must_lead(self) -> None:
        if self.lease is None:
            holder = self._named(self._view.lease.holder) if self._view is not None else "nobody yet"
            raise InvalidRequestError(
                f"this node does not coordinate the fleet (the lease is held by {holder})", hint="ask that node"
            )


def _places(plan: Plan) -> list[tuple[NodeId, int, int]]:
    return [(stage.node, stage.start, stage.stop) for stage in plan.stages]


def describe_answer(answer: Answer) -> str:
    """One line about a plan, for the event log."""
    match answer:
        case Plan(stages=stages, estimate=figures):
            cuts = ", ".join(f"[{s.start}, {s.stop}) on {s.node}" for s in stages)
            return f"{len(stages)} stages: {cuts}; {figures.time_per_output_token_s * 1000:.1f} ms per token predicted"
        case Infeasible(reason=reason):
            return f"no plan fits: {reason}"
