"""The coordinator's picture of its fleet: `apply(state, event) -> state`, idempotent and free of I/O.

A member's standing is a function of how long ago it was heard (`standing`), on the coordinator's own clock: nothing is stored
that silence alone could make wrong.
"""

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import assert_never

import msgspec

from shoal.fleet.deployment import (
    Deployment,
    MendEvent,
    MendingEnded,
    MoveBegun,
    MoveClosing,
    MoveDropped,
    MoveEnded,
    MoveEvent,
    MoveMade,
    PlanMended,
    PlanServed,
    StandbysChosen,
    mended,
    moved,
)
from shoal.fleet.report import NodeReport, ShardId
from shoal.fleet.sleep import FellAsleep, RoomAwaited, SleepBegun, SleepEvent, Woken, rested
from shoal.fleet.spec import DeploymentSpec
from shoal.ids import DeploymentId, NodeId
from shoal.plan.problem import Answer, Plan

SUSPECT_AFTER_S = 0.8
LOST_AFTER_S = 2.5
VANISHED_LOST_AFTER_S = 0.9
"""As `LOST_AFTER_S`, for a node whose process, or link, was seen to end: it was killed, or has four heartbeats to show itself.

A link that only flaps is up again within that time more often than not, and a killed node is still given up within a second.
"""
HINT_RACE_S = 0.1
"""A heartbeat that comes so soon after that sight may have been under way before it."""
DRAINED_AFTER_S = 1.0
"""A plan that is left counts as drained when its first stage has said for that long that it answers nobody.

One report proves nothing: it may be as old as a heartbeat, and a gateway may have sent a request before it heard of the leaving.
"""


class Standing(StrEnum):
    """What the fleet makes of a node."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    LOST = "lost"
    LEAVING = "leaving"


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A node and when it was last heard, in the coordinator's seconds."""

    report: NodeReport
    heard_s: float
    vanished_s: float | None = None
    """When its process or link was seen to end, unless it was heard since."""


class FleetState(msgspec.Struct, frozen=True, kw_only=True):
    """Members by id and deployments by name."""

    members: dict[NodeId, Member] = {}
    deployments: dict[DeploymentId, Deployment] = {}
    quiet_since_s: dict[tuple[DeploymentId, int], float] = {}
    """Of plans that are to end, by epoch: when their first stage began to say that it answers nobody."""


class NodeHeard(msgspec.Struct, frozen=True, kw_only=True, tag="node_heard"):
    """A heartbeat arrived."""

    report: NodeReport
    at_s: float


class NodeVanished(msgspec.Struct, frozen=True, kw_only=True, tag="node_vanished"):
    """The fabric has seen a node's process end, or its link: a hint, which the next heartbeat takes back."""

    node: NodeId
    incarnation: int
    at_s: float


class NodeForgotten(msgspec.Struct, frozen=True, kw_only=True, tag="node_forgotten"):
    """A node said goodbye or has been lost for so long that it is dropped from the list."""

    node: NodeId
    incarnation: int


class DeploymentWanted(msgspec.Struct, frozen=True, kw_only=True, tag="deployment_wanted"):
    """An operator declared or changed a deployment."""

    spec: DeploymentSpec


class DeploymentDropped(msgspec.Struct, frozen=True, kw_only=True, tag="deployment_dropped"):
    """An operator stopped a deployment."""

    deployment: DeploymentId
    generation: int


class PlanMade(msgspec.Struct, frozen=True, kw_only=True, tag="plan_made"):
    """The planner answered; a higher epoch replaces a lower one."""

    deployment: DeploymentId
    plan_epoch: int
    answer: Answer
    at_s: float


Event = (
    NodeHeard
    | NodeVanished
    | NodeForgotten
    | DeploymentWanted
    | DeploymentDropped
    | PlanMade
    | MoveEvent
    | MendEvent
    | SleepEvent
)


def apply(state: FleetState, event: Event) -> FleetState:
    """The state after *event*; applying the same event again changes nothing, and older news never replaces newer."""
    match event:
        case NodeHeard():
            return _heard(state, event)
        case NodeVanished():
            return _vanished(state, event)
        case NodeForgotten(node=node, incarnation=incarnation):
            known = state.members.get(node)
            if known is None or known.report.incarnation > incarnation:
                return state
            return msgspec.structs.replace(state, members={n: m for n, m in state.members.items() if n != node})
        case DeploymentWanted(spec=spec):
            return _wanted(state, spec)
        case DeploymentDropped(deployment=name, generation=generation):
            old = state.deployments.get(name)
            if old is None or old.spec.generation > generation:
                return state
            rest = {n: d for n, d in state.deployments.items() if n != name}
            return _without_quiet(msgspec.structs.replace(state, deployments=rest), name, *old.epochs)
        case PlanMade():
            return _planned(state, event)
        case MoveBegun() | MoveClosing() | MoveMade() | MoveEnded() | MoveDropped():
            old = state.deployments.get(event.deployment)
            return _with_deployment(state, moved(old, event) if old is not None else None)
        case PlanServed() | PlanMended() | MendingEnded() | StandbysChosen():
            old = state.deployments.get(event.deployment)
            return _with_deployment(state, mended(old, event) if old is not None else None)
        case SleepBegun() | FellAsleep() | Woken() | RoomAwaited():
            old = state.deployments.get(event.deployment)
            return _with_deployment(state, rested(old, event) if old is not None else None)
        case _:
            assert_never(event)


def standing(member: Member, now_s: float) -> Standing:
    """What silence up to *now_s* means; a leaving node that has fallen silent is gone."""
    silent_s, vanished = now_s - member.heard_s, member.vanished_s is not None
    if silent_s >= (VANISHED_LOST_AFTER_S if vanished else LOST_AFTER_S):
        return Standing.LOST
    if member.report.leaving:
        return Standing.LEAVING
    return Standing.SUSPECT if vanished or silent_s >= SUSPECT_AFTER_S else Standing.ALIVE


def lost_in_haste(state: FleetState, now_s: float) -> bool:
    """Whether a node counts as lost that may only be cut off for a moment: its silence alone would not prove it yet."""
    return any(
        standing(member, now_s) is Standing.LOST and now_s - member.heard_s < LOST_AFTER_S
        for member in state.members.values()
    )


def unheard(state: FleetState) -> bool:
    """Whether a plan names a node that has never been heard."""
    plans = [d.answer for d in state.deployments.values() if isinstance(d.answer, Plan)]
    return any(stage.node not in state.members for plan in plans for stage in plan.stages)


def highest_plan_epoch(state: FleetState) -> int:
    """Shards are known by deployment and plan epoch: no epoch may come twice, also after a drop or a takeover."""
    made = [epoch for deployment in state.deployments.values() for epoch in deployment.epochs]
    held = [s.shard.plan_epoch for m in state.members.values() for s in m.report.shards]
    return max([0, *made, *held])


def drained(state: FleetState, name: DeploymentId, *, former: bool = False) -> bool:
    """Whether the plan of *name*, or its *former* one, is to end and has answered nobody for `DRAINED_AFTER_S`.

    From report to report of its first stage's node: silence is no proof that nobody is answered.
    """
    deployment = state.deployments.get(name)
    if deployment is None:
        return False
    left = deployment.former
    epoch, plan = (left.plan_epoch, left.plan) if former and left else (deployment.plan_epoch, deployment.answer)
    since_s = state.quiet_since_s.get((name, epoch))
    if since_s is None or not isinstance(plan, Plan):
        return False
    first = state.members.get(plan.stages[0].node)
    return first is not None and first.heard_s - since_s >= DRAINED_AFTER_S


def _heard(state: FleetState, event: NodeHeard) -> FleetState:
    known = state.members.get(event.report.node)
    if known is not None and not event.report.newer_than(known.report):
        return state
    member = Member(report=event.report, heard_s=event.at_s, vanished_s=_still_vanished(known, event))
    state = msgspec.structs.replace(state, members={**state.members, event.report.node: member})
    for name, deployment in state.deployments.items():
        for epoch, plan, ends in _plans(deployment, state.members):
            if plan.stages[0].node == event.report.node:
                state = _with_quiet(state, ShardId(deployment=name, plan_epoch=epoch, stage=0), member, ends=ends)
    return state


def _vanished(state: FleetState, event: NodeVanished) -> FleetState:
    known = state.members.get(event.node)
    if known is None or known.report.incarnation != event.incarnation or event.at_s < known.heard_s:
        return state
    gone = msgspec.structs.replace(known, vanished_s=event.at_s)
    return msgspec.structs.replace(state, members={**state.members, event.node: gone})


def _wanted(state: FleetState, spec: DeploymentSpec) -> FleetState:
    old = state.deployments.get(spec.deployment)
    if old is not None and old.spec.generation >= spec.generation:
        return state
    epoch = old.plan_epoch if old is not None else 0
    return _with_deployment(state, Deployment(spec=spec, plan_epoch=epoch, asleep=spec.on_demand))


def _planned(state: FleetState, event: PlanMade) -> FleetState:
    old = state.deployments.get(event.deployment)
    if old is None or old.asleep or old.plan_epoch >= event.plan_epoch:
        return state
    planned = Deployment(
        spec=old.spec, plan_epoch=event.plan_epoch, answer=event.answer, planned_s=event.at_s, held=old.held
    )
    return _with_deployment(state, planned)


def _still_vanished(known: Member | None, event: NodeHeard) -> float | None:
    if known is None or known.vanished_s is None or event.report.incarnation != known.report.incarnation:
        return None
    return known.vanished_s if event.at_s - known.vanished_s < HINT_RACE_S else None


def _plans(deployment: Deployment, members: Mapping[NodeId, Member]) -> Iterator[tuple[int, Plan, bool]]:
    """The plans of *deployment* that may answer, and whether they are to end."""
    if isinstance(deployment.answer, Plan):
        stages, heir = deployment.answer.stages, deployment.successor
        leaving = any(members[s.node].report.leaving for s in stages if s.node in members)
        closing = heir is not None and heir.closing_s is not None
        yield deployment.plan_epoch, deployment.answer, leaving or closing or deployment.drowsy is not None
    if deployment.former is not None:
        yield deployment.former.plan_epoch, deployment.former.plan, True


def _with_quiet(state: FleetState, shard: ShardId, first: Member, *, ends: bool) -> FleetState:
    """*state* after the node of the first stage was heard."""
    busy = any(s.live_requests + s.waiting_requests for s in first.report.shards if s.shard == shard)
    key = (shard.deployment, shard.plan_epoch)
    if not ends or busy:
        return _without_quiet(state, *key)
    return msgspec.structs.replace(state, quiet_since_s={key: first.heard_s, **state.quiet_since_s})


def _without_quiet(state: FleetState, name: DeploymentId, *epochs: int) -> FleetState:
    gone = {(name, epoch) for epoch in epochs}
    if not gone & state.quiet_since_s.keys():
        return state
    return msgspec.structs.replace(state, quiet_since_s={n: s for n, s in state.quiet_since_s.items() if n not in gone})


def _with_deployment(state: FleetState, deployment: Deployment | None) -> FleetState:
    """What was said of its plans before says nothing of what they are now.  None: nothing has changed."""
    if deployment is None:
        return state
    name, old = deployment.spec.deployment, state.deployments.get(deployment.spec.deployment)
    changed = msgspec.structs.replace(state, deployments={**state.deployments, name: deployment})
    return _without_quiet(changed, name, *deployment.epochs, *(old.epochs if old is not None else ()))
