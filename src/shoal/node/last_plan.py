"""The last plans that a node heard of, on its own disk: what it serves when it restarts and no coordinator is there (ADR 4, 5)."""

import msgspec

from shoal.fleet.reconcile import Phase, phase
from shoal.fleet.report import NodeReport
from shoal.fleet.view import CoordinatorView, DeploymentStatus
from shoal.node.journal import Journal
from shoal.plan.problem import Plan

_KIND, _KEY = "view", "last"


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


def alone(view: CoordinatorView, report: NodeReport) -> CoordinatorView:
    """*view* as far as one node can tell it by itself: a plan that lies on it entirely stands where its shards stand.

    Others wait: only a coordinator can wire a pipeline again whose worker was started anew.  Any broadcast of that lease is newer.
    """
    return msgspec.structs.replace(view, sequence=0, deployments=tuple(_alone(s, report) for s in view.deployments))


def _alone(status: DeploymentStatus, report: NodeReport) -> DeploymentStatus:
    plan = status.deployment.answer
    if isinstance(plan, Plan) and {stage.node for stage in plan.stages} == {report.node}:
        return msgspec.structs.replace(status, phase=phase(status.deployment, {report.node: report}), reason="")
    reason = "no coordinator has been heard since this node was started"
    return msgspec.structs.replace(status, phase=Phase.RECOVERING, reason=reason)


def _plans(view: CoordinatorView) -> list[tuple[str, int, int]]:
    found = (status.deployment for status in view.deployments)
    return sorted((d.spec.deployment, d.spec.generation, d.plan_epoch) for d in found)
