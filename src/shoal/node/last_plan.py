"""The last plans that a node heard of, on its own disk: what it serves when it restarts and no coordinator is there (ADR 4, 5).

A plan over several nodes outlives the restart of one of them because its workers listen again where they did: their ports are
kept, the neighbours go on dialling, and nobody has to be told anything.
"""

from collections.abc import Mapping

import msgspec

from shoal.fleet.deployment import Deployment
from shoal.fleet.reconcile import Phase, broken, phase
from shoal.fleet.report import NodeFacts, NodeReport, ShardId, ShardReport, ShardState
from shoal.fleet.view import CoordinatorView, DeploymentStatus
from shoal.ids import NodeId
from shoal.node.journal import Journal
from shoal.plan.problem import Plan

_KIND, _KEY, _PORT = "view", "last", "port"


def remember(journal: Journal, view: CoordinatorView) -> None:
    """Keep *view*, durably.  Blocks: run it on a thread."""
    journal.put(_KIND, _KEY, view)


def recall(journal: Journal) -> CoordinatorView | None:
    """The view that was kept last; None when there is none or it is of another version."""
    try:
        return journal.get(_KIND, _KEY, CoordinatorView)
    except msgspec.MsgspecError:
        return None


def says_the_same(view: CoordinatorView, other: CoordinatorView | None) -> bool:
    """Whether both are of one lease and name the same plans: then the kept one need not be written again."""
    return other is not None and (view.lease, _plans(view)) == (other.lease, _plans(other))


class _Port(msgspec.Struct, frozen=True, kw_only=True):
    port: int


def keep_port(journal: Journal, shard: ShardId, port: int) -> None:
    """Remember where the worker of *shard* listens for the stage before it, durably.  Blocks."""
    journal.put(_PORT, str(shard), _Port(port=port))


def kept_port(journal: Journal, shard: ShardId) -> int:
    """Where it listened last; 0 when that is not known."""
    kept = journal.get(_PORT, str(shard), _Port)
    return kept.port if kept is not None else 0


def forget_port(journal: Journal, shard: ShardId) -> None:
    """The shard was given up.  Blocks."""
    journal.remove(_PORT, str(shard))


def alone(view: CoordinatorView, report: NodeReport, others: Mapping[NodeId, NodeReport]) -> CoordinatorView:
    """*view* as far as one node can tell it by itself, from its own *report* and those of *others* that it hears.

    A node of a plan that is not heard is believed to hold its stage: the way between agents may lead through the coordinator
    that is away, and stages see for themselves whether the next one lives.  A plan whose first stage is on such a node waits,
    for nobody could ask it.  Any broadcast of that lease is newer.
    """
    heard = {**others, report.node: report}
    return msgspec.structs.replace(view, sequence=0, deployments=tuple(_alone(s, heard) for s in view.deployments))


def _alone(status: DeploymentStatus, heard: Mapping[NodeId, NodeReport]) -> DeploymentStatus:
    # Half of a move is none: nobody is there to end it.
    # And nobody gives a lost stage to somebody else, or wakes what falls asleep.
    deployment = msgspec.structs.replace(
        status.deployment,
        successor=None,
        former=None,
        held=False,
        drowsy=None,
        beyond_mending="no coordinator is heard",
    )
    plan, status = deployment.answer, msgspec.structs.replace(status, deployment=deployment)
    if isinstance(plan, Plan) and plan.stages[0].node in heard:
        reports = {
            **{n: _believed(deployment, plan, n, heard) for n in {s.node for s in plan.stages} - heard.keys()},
            **heard,
        }
        return msgspec.structs.replace(status, phase=phase(deployment, reports), reason=broken(deployment, reports))
    reason = "no coordinator has been heard since this node was started"
    return msgspec.structs.replace(status, phase=Phase.RECOVERING, reason=reason)


def _believed(deployment: Deployment, plan: Plan, node: NodeId, heard: Mapping[NodeId, NodeReport]) -> NodeReport:
    """What a node would report whose stages are as the plan wants them, where those before them send to."""
    shards: list[ShardReport] = []
    for index, stage in enumerate(plan.stages):
        if stage.node == node:
            shard = ShardId(deployment=deployment.spec.deployment, plan_epoch=deployment.plan_epoch, stage=index)
            before = (index - 1) % len(plan.stages)
            sender = msgspec.structs.replace(shard, stage=before)
            report = heard.get(plan.stages[before].node)
            known = [s.wired_to for s in (report.shards if report else ()) if s.shard == sender]
            shards.append(
                ShardReport(
                    shard=shard,
                    state=ShardState.WIRED,
                    start=stage.start,
                    stop=stage.stop,
                    attempt=deployment.attempt_of(index),
                    locators=known[0] if known else (),
                )
            )
    facts = NodeFacts(name=node, version="", locators=(), cores=0, memory_total_bytes=0, memory_budget_bytes=0)
    return NodeReport(node=node, incarnation=0, sequence=0, facts=facts, shards=tuple(shards))


def _plans(view: CoordinatorView) -> list[tuple[str, int, tuple[int, ...]]]:
    found = (status.deployment for status in view.deployments)
    return sorted((d.spec.deployment, d.spec.generation, d.epochs) for d in found)
