"""The coordinator's picture of its fleet: `apply(state, event) -> state`, idempotent and free of I/O.

A member's standing is a function of how long ago it was heard (`standing`), on the coordinator's own clock: nothing is stored
that silence alone could make wrong.
"""

from enum import StrEnum
from typing import assert_never

import msgspec

from shoal.fleet.report import NodeReport
from shoal.fleet.spec import DeploymentSpec
from shoal.ids import DeploymentId, NodeId
from shoal.plan.problem import Answer

SUSPECT_AFTER_S = 0.8
LOST_AFTER_S = 2.5


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


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """What is wanted and the plan made for it; `plan_epoch` 0 means that none was made yet."""

    spec: DeploymentSpec
    plan_epoch: int = 0
    answer: Answer | None = None
    planned_s: float = 0.0


class FleetState(msgspec.Struct, frozen=True, kw_only=True):
    """Members by id and deployments by name."""

    members: dict[NodeId, Member] = {}
    deployments: dict[DeploymentId, Deployment] = {}


class NodeHeard(msgspec.Struct, frozen=True, kw_only=True, tag="node_heard"):
    """A heartbeat arrived."""

    report: NodeReport
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


Event = NodeHeard | NodeForgotten | DeploymentWanted | DeploymentDropped | PlanMade


def apply(state: FleetState, event: Event) -> FleetState:
    """The state after *event*; applying the same event again changes nothing, and older news never replaces newer."""
    match event:
        case NodeHeard():
            return _heard(state, event)
        case NodeForgotten(node=node, incarnation=incarnation):
            known = state.members.get(node)
            if known is None or known.report.incarnation > incarnation:
                return state
            return msgspec.structs.replace(state, members={n: m for n, m in state.members.items() if n != node})
        case DeploymentWanted(spec=spec):
            old = state.deployments.get(spec.deployment)
            if old is not None and old.spec.generation >= spec.generation:
                return state
            epoch = old.plan_epoch if old is not None else 0
            return _with_deployment(state, Deployment(spec=spec, plan_epoch=epoch))
        case DeploymentDropped(deployment=name, generation=generation):
            old = state.deployments.get(name)
            if old is None or old.spec.generation > generation:
                return state
            rest = {n: d for n, d in state.deployments.items() if n != name}
            return msgspec.structs.replace(state, deployments=rest)
        case PlanMade():
            old = state.deployments.get(event.deployment)
            if old is None or old.plan_epoch >= event.plan_epoch:
                return state
            planned = Deployment(spec=old.spec, plan_epoch=event.plan_epoch, answer=event.answer, planned_s=event.at_s)
            return _with_deployment(state, planned)
        case _:
            assert_never(event)


def standing(member: Member, now_s: float) -> Standing:
    """What silence up to *now_s* means; a leaving node that has fallen silent is gone."""
    silent_s = now_s - member.heard_s
    if member.report.leaving and silent_s < LOST_AFTER_S:
        return Standing.LEAVING
    if silent_s < SUSPECT_AFTER_S:
        return Standing.ALIVE
    return Standing.SUSPECT if silent_s < LOST_AFTER_S else Standing.LOST


def _heard(state: FleetState, event: NodeHeard) -> FleetState:
    known = state.members.get(event.report.node)
    if known is not None and not event.report.newer_than(known.report):
        return state
    member = Member(report=event.report, heard_s=event.at_s)
    return msgspec.structs.replace(state, members={**state.members, event.report.node: member})


def _with_deployment(state: FleetState, deployment: Deployment) -> FleetState:
    changed = {**state.deployments, deployment.spec.deployment: deployment}
    return msgspec.structs.replace(state, deployments=changed)
