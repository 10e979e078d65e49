"""The coordinator's loop: heartbeats in, a plan per deployment, orders out (ADR 5).

A role, not a machine: every node that may coordinate runs this object, and it acts only while it holds the lease (`tenure`).  How a
plan comes about is told in `placing`, when it is tried again in `patience`, when an order is given again in `ordering`; what the
view says of a deployment is a function of the state (`fleet.statuses`).
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import anyio
import anyio.abc
import anyio.to_thread
import msgspec

from shoal.clock import Clock
from shoal.errors import InvalidRequestError, ShoalError, UnknownModelError
from shoal.fleet.deployment import Deployment, resumed
from shoal.fleet.moves import move_orders
from shoal.fleet.order import Refused, Reply
from shoal.fleet.reading import check_readable
from shoal.fleet.reconcile import Addressed, Phase, missing_orders
from shoal.fleet.report import NodeReport
from shoal.fleet.sleep import RoomAwaited, Woken
from shoal.fleet.spec import DeploymentSpec
from shoal.fleet.state import (
    DeploymentDropped,
    DeploymentWanted,
    Event,
    FleetState,
    NodeHeard,
    NodeVanished,
    PlanMade,
    Standing,
    apply,
    highest_plan_epoch,
    lost_in_haste,
    standing,
    unheard,
)
from shoal.fleet.statuses import describe_answer, named, phases, statuses, why_broken
from shoal.fleet.view import LEASE_S, CoordinatorView, Lease
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.node.attendance import Attendance
from shoal.node.journal import Journal
from shoal.node.mending import Mending
from shoal.node.moving import Moving, Note
from shoal.node.ordering import Ordering
from shoal.node.patience import Patience
from shoal.node.placing import Placing, Planner
from shoal.node.tenure import Tenure
from shoal.node.waking import NoRoomYet, Waking
from shoal.node.weighing import Weighing
from shoal.plan.problem import Answer, Infeasible, Plan, Problem
from shoal.plan.replan import RULES, Rules
from shoal.profile.fleet import FleetProfile
from shoal.transport.codec import Codec

TICK_S = 0.1
VIEW_EVERY_S = 0.5
RETRY_DISK_S = 2.0
"""Until the journal is asked again that did not take a record."""


def hear_nothing(_report: NodeReport, _served: Mapping[DeploymentId, Digest]) -> None:
    """Learn nothing from heartbeats."""


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
    heard: Callable[[NodeReport, Mapping[DeploymentId, Digest]], None] = hear_nothing
    """Told each heartbeat, with the models behind the names of deployments: what is known of devices is corrected by them."""
    move_rules: Rules = RULES
    tick_s: float = TICK_S
    state: FleetState = field(default_factory=FleetState)
    _tenure: Tenure = field(init=False)
    _attendance: Attendance = field(init=False)
    _placing: Placing = field(init=False)
    _mending: Mending = field(init=False)
    _waking: Waking = field(init=False)
    moving: Moving = field(init=False)
    """What pays and is under way."""
    _patience: Patience = field(default_factory=Patience)
    _ordering: Ordering = field(default_factory=Ordering)
    _disk_rests_until_s: float = float("-inf")
    _phases: dict[DeploymentId, Phase] = field(default_factory=dict)
    _one_plan: anyio.Lock = field(default_factory=anyio.Lock)
    """Two plans at once would both count on the same free memory."""
    _one_record: anyio.Lock = field(default_factory=anyio.Lock)
    """Of two records of one deployment, the newer should be written last."""

    def __post_init__(self) -> None:
        self._tenure = Tenure(me=self.me, journal=self.journal, eager=self.eager)
        self._attendance = Attendance(self.note, self._patience.forget_all, self._apply)
        self._placing = Placing(self.planner, self.clock, lambda: self.state)
        self.moving = Moving(
            Weighing(self._placing, self.clock, lambda: self.state, self.move_rules),
            self.clock,
            lambda: self.state,
            self._apply,
            lambda above: self._number("plan", above=above),
            self._keep,
            lambda kind, text, **where: self.note(kind, named(text, self.state.members), **where),
            self._one_plan,
        )
        self._mending = Mending(
            self._placing,
            self.moving.weighing.ready,
            lambda: self.state,
            self.clock.now_s,
            self._apply,
            self._keep,
            lambda kind, text, **where: self.note(kind, named(text, self.state.members), **where),
            self._one_plan,
        )
        self._waking = Waking(self._placing, self.clock, lambda: self.state, self._apply, self._keep)

    @property
    def lease(self) -> Lease | None:
        """The lease that this node holds, as far as it knows."""
        return self._tenure.lease

    @property
    def leading(self) -> bool:
        """Whether it holds one."""
        return self.lease is not None

    def hear_report(self, report: NodeReport) -> None:
        """A heartbeat of any node, this one included."""
        before = self.state.members.get(report.node)
        if before is not None and set(report.manifests) - set(before.report.manifests):
            self._patience.forget_all()
        self.state = apply(self.state, NodeHeard(report=report, at_s=self.clock.now_s()))
        if self.leading:
            self.heard(report, {name: d.spec.manifest for name, d in self.state.deployments.items()})
        if report.facts.coordinates:
            self._tenure.meet(report.node)

    def hear_vanished(self, node: NodeId, incarnation: int) -> None:
        """The fabric's hint that a node's process, or its link, has ended."""
        self.state = apply(self.state, NodeVanished(node=node, incarnation=incarnation, at_s=self.clock.now_s()))

    def hear_view(self, view: CoordinatorView) -> None:
        """A broadcast of whoever holds the lease; a higher epoch than ours ends ours."""
        if self._tenure.hear(view, self.clock.now_s()):
            self.note("coordinator.stepped_down", f"lease {view.lease.fencing_epoch} is newer", node=view.lease.holder)

    async def want(self, spec: DeploymentSpec, previewed: Plan | None = None) -> None:
        """Declare a deployment; durable before it returns.

        What is wanted already, and would be placed as it is (*previewed*), stays as it is: nothing is loaded again.
        """
        self._must_lead()
        check_readable(spec, (member.report.facts for member in self.state.members.values()))
        name = spec.deployment
        old = self.state.deployments.get(name)
        if old is not None and self._stands(old, spec, previewed):
            return
        # Never a number of a deployment that was dropped: a plan made for that one must not count for this one.
        generation = await self._number("generation", above=old.spec.generation if old else 0)
        spec = msgspec.structs.replace(spec, generation=generation)
        self.state = apply(self.state, DeploymentWanted(spec=spec))
        self._patience.forget(name)
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
        self._patience.forget(name)
        await anyio.to_thread.run_sync(lambda: self.journal.remove("deployment", name))
        self.show()

    async def wake(self, name: DeploymentId) -> None:
        """Have a deployment loaded that is asleep; harmless when it is awake.  Raises UnknownModelError."""
        self._must_lead()
        if name not in self.state.deployments:
            raise UnknownModelError(f"no deployment is named {name!r}", hint="`shoal ps` lists them")
        before = self.state
        self._apply(Woken(deployment=name))
        if self.state is not before:
            self._patience.forget(name)
            self.show()
            await self._keep(name)

    async def preview(self, spec: DeploymentSpec) -> Answer:
        """The plan that *spec* would get once those are gone that are loaded on demand; nothing is loaded."""
        surveyed = await self._placing.survey(spec)
        return await self._placing.place(spec, surveyed, without=self._guests())

    async def state_problem(self, spec: DeploymentSpec) -> Problem | Infeasible:
        """What `preview` would be answered from."""
        surveyed = await self._placing.survey(spec)
        return await self._placing.problem(spec, surveyed, without=self._guests())

    def view(self) -> CoordinatorView | None:
        """The newest view, ours or heard; None before the first."""
        return self._tenure.view

    def nodes(self) -> dict[NodeId, tuple[NodeReport, Standing, float]]:
        """Every member with its standing and the seconds since it was heard."""
        now_s = self.clock.now_s()
        return {n: (m.report, standing(m, now_s), now_s - m.heard_s) for n, m in self.state.members.items()}

    async def run(self) -> None:
        """Tick until cancelled."""
        self._tenure.begin(self.clock.now_s())
        kept = {d.spec.deployment: d for d in self.journal.all("deployment", Deployment)}
        found = {n: resumed(d, self.clock.now_s()) for n, d in kept.items()}
        self.state = msgspec.structs.replace(self.state, deployments={**found, **self.state.deployments})
        shown_s = float("-inf")
        async with anyio.create_task_group() as group:
            while True:
                now_s = self.clock.now_s()
                await self._write(now_s)
                if self.lease is not None:
                    self._attendance.watch(self.state, now_s)
                    if not self._gathering():
                        self._mending.tick(now_s, group)
                        self.moving.tick(now_s, group)
                        self._waking.tick(now_s, group)
                    for deployment in self._to_plan(now_s):
                        self._patience.began(deployment.spec.deployment)
                        group.start_soon(self._replan, deployment)
                    self._order(now_s, group)
                    if now_s - shown_s >= VIEW_EVERY_S or phases(self.state, now_s) != self._phases:
                        # At once when something changed: no gateway should send a request to a plan that drains.
                        self.show()
                        shown_s = now_s
                await anyio.sleep(self.tick_s)

    def show(self) -> None:
        """Broadcast the view; does nothing without the lease, or while nodes are still gathering."""
        if self.lease is None or self._gathering():
            return
        now_s = self.clock.now_s()
        view = self._tenure.tell(self.lease, statuses(self.state, now_s), now_s)
        self._note_phases(view)
        self.broadcast(view)

    async def _write(self, now_s: float) -> None:
        """What is due and must be on disk before it counts: another coordinator that was heard of, and a lease of our own.

        A disk that is full delays both, and ends nothing.
        """
        if now_s < self._disk_rests_until_s:
            return
        try:
            await self._tenure.write()
            if self._tenure.due(now_s):
                await self._lead(now_s)
        except ShoalError as error:
            self._disk_rests_until_s = now_s + RETRY_DISK_S
            self.note("coordinator.not_written", error.message, node=self.me)

    async def _lead(self, now_s: float) -> None:
        epoch = await self._tenure.next_epoch()
        last = self._tenure.view
        if last is not None and last.lease.holder != self.me:
            await self._take_over(last)
        self._tenure.take(epoch, now_s)
        self.begin_log(epoch)
        self.note("coordinator.leads", f"lease {epoch}", node=self.me)
        self.show()

    async def _take_over(self, view: CoordinatorView) -> None:
        """What the last holder wanted is wanted now, and what it dropped stays dropped, whatever we knew before."""
        now_s = self.clock.now_s()
        theirs = {s.deployment.spec.deployment: resumed(s.deployment, now_s) for s in view.deployments}
        for gone in self.state.deployments.keys() - theirs.keys():
            await anyio.to_thread.run_sync(self.journal.remove, "deployment", gone)
        for deployment in theirs.values():
            await self._remember(deployment)
        self.state = msgspec.structs.replace(self.state, deployments=theirs)

    def _gathering(self) -> bool:
        """Whether nodes of a plan may still be on their way to us: whoever has just started has heard nobody yet.

        Nothing is planned anew and nothing is said meanwhile, or each restart of a coordinator would break what works.
        """
        return unheard(self.state) and self.clock.now_s() - self._tenure.since_s < LEASE_S

    def _to_plan(self, now_s: float) -> list[Deployment]:
        if self._gathering():
            return []
        found = []
        for name, stands in phases(self.state, now_s).items():
            match stands:
                case Phase.PLANNING | Phase.RECOVERING | Phase.REFUSED:
                    self._patience.breaks(name, now_s)
                    if self._patience.allows(name, now_s):
                        found.append(self.state.deployments[name])
                case Phase.SERVING:
                    self._patience.serves(name, now_s)
                case Phase.DRAINING | Phase.ASLEEP:
                    self._patience.drains(name)
                case Phase.LOADING | Phase.MOVING | Phase.MENDING | Phase.DROWSY:
                    pass
        return found

    async def _replan(self, deployment: Deployment) -> None:
        name = deployment.spec.deployment
        try:
            ready = self.moving.weighing.ready(deployment)
            surveyed = await self._placing.survey(deployment.spec) if ready is None else None
            async with self._one_plan:
                await self._plan_anew(deployment.spec, surveyed, ready)
        except ShoalError as error:
            self._failed(name, error.message)
        except Exception as error:  # noqa: BLE001 a fault in planning one model must not end the service of the others
            self._failed(name, f"{type(error).__name__}: {error}")
        finally:
            self._patience.ended(name, self.clock.now_s())

    async def _plan_anew(self, spec: DeploymentSpec, surveyed: FleetProfile | None, ready: Plan | None) -> None:
        """Put *ready* in force, or what is found on the *surveyed* fleet."""
        name = spec.deployment
        answer = ready if surveyed is None else await self._place(spec, surveyed)
        assert answer is not None
        current = self.state.deployments.get(name)
        if self.lease is None or current is None or current.spec.generation != spec.generation or current.asleep:
            return
        if isinstance(answer, NoRoomYet):
            self._patience.postponed(name)
            self._apply(RoomAwaited(deployment=name, why=answer.why))
            return
        if isinstance(answer, Infeasible) and current.answer == answer:
            return
        if isinstance(current.answer, Plan):
            if self._sound(current):
                return  # what it lacked has come back in the meantime
            if isinstance(answer, Infeasible) and lost_in_haste(self.state, self.clock.now_s()):
                return  # it would unload what still stands, and the node may be back before that is done
        epoch = await self._number("plan", above=highest_plan_epoch(self.state))
        if self.state.deployments.get(name) is not current:
            return
        made = PlanMade(deployment=name, plan_epoch=epoch, answer=answer, at_s=self.clock.now_s())
        self.state = apply(self.state, made)
        self._patience.counted(name)
        said = named(describe_answer(answer), self.state.members)
        self.note("plan.made", f"{said}{'; made before the loss' if ready else ''}", deployment=name)
        await self._keep(name)
        self.show()

    async def _place(self, spec: DeploymentSpec, surveyed: FleetProfile) -> Answer | NoRoomYet:
        answer = await self._placing.place(spec, surveyed)
        return await self._waking.room(spec, surveyed, answer) if isinstance(answer, Infeasible) else answer

    async def _keep(self, name: DeploymentId) -> None:
        """Have *name* on disk as it is now; what is in force is in force all the same when the disk does not take it."""
        async with self._one_record:
            try:
                if name in self.state.deployments:
                    await self._remember(self.state.deployments[name])
            except ShoalError as error:
                self.note("coordinator.not_written", error.message, deployment=name)

    def _apply(self, event: Event) -> None:
        self.state = apply(self.state, event)

    def _failed(self, name: DeploymentId, why: str) -> None:
        self._patience.counted(name)
        self.note("plan.failed", named(why, self.state.members), deployment=name)

    async def _number(self, name: str, *, above: int) -> int:
        return await anyio.to_thread.run_sync(lambda: self.journal.next_number(name, above=above))

    def _stands(self, old: Deployment, spec: DeploymentSpec, previewed: Plan | None) -> bool:
        """Whether *spec* asks for nothing but what *old* is, placed as it is now and in good order."""
        same = msgspec.structs.replace(spec, generation=old.spec.generation) == old.spec
        plan = old.answer
        if same and spec.on_demand:
            return True  # it is placed whenever it is loaded
        if not same or previewed is None or not isinstance(plan, Plan):
            return False
        return self._sound(old) and _places(plan) == _places(previewed)

    def _guests(self) -> list[DeploymentId]:
        """Those that are loaded on demand: their memory is theirs only while they are in use."""
        return [name for name, deployment in self.state.deployments.items() if deployment.spec.on_demand]

    def _sound(self, deployment: Deployment) -> bool:
        return not why_broken(self.state, deployment, self.clock.now_s())

    async def _remember(self, deployment: Deployment) -> None:
        name = deployment.spec.deployment
        await anyio.to_thread.run_sync(lambda: self.journal.put("deployment", name, deployment))

    def _order(self, now_s: float, group: anyio.abc.TaskGroup) -> None:
        """Send what is due; nobody waits here for a node that does not answer."""
        if self.lease is None:
            return
        epoch = self.lease.fencing_epoch
        missing = (*missing_orders(self.state, epoch, now_s), *move_orders(self.state, epoch, now_s))
        for addressed in self._ordering.due(missing, now_s):
            group.start_soon(self._send, addressed)

    async def _send(self, addressed: Addressed) -> None:
        try:
            reply = await self.send_order(addressed)
        except ShoalError:
            return  # lost, or refused by a node of another version: its reports say what it does; the order is given again
        if isinstance(reply, Refused) and self.lease is not None and reply.fencing_epoch > self.lease.fencing_epoch:
            self.note("coordinator.fenced", f"lease {reply.fencing_epoch} is newer", node=addressed.node)
            self._tenure.fenced(reply.fencing_epoch)

    def _note_phases(self, view: CoordinatorView) -> None:
        before, self._phases = self._phases, {s.deployment.spec.deployment: s.phase for s in view.deployments}
        for status in view.deployments:
            name = status.deployment.spec.deployment
            if before.get(name) is not status.phase:
                self.note(f"deployment.{status.phase.value}", status.reason or "as planned", deployment=name)

    def _must_lead(self) -> None:
        if self.lease is None:
            view = self._tenure.view
            holder = named(view.lease.holder, self.state.members) if view is not None else "nobody yet"
            raise InvalidRequestError(
                f"this node does not coordinate the fleet (the lease is held by {holder})", hint="ask that node"
            )


def _places(plan: Plan) -> list[tuple[NodeId, int, int, Codec]]:
    return [(stage.node, stage.start, stage.stop, stage.writes) for stage in plan.stages]
