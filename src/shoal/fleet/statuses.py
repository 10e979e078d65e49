"""The fleet's state in the words of the view: phases, reasons, and names in place of ids."""

from collections.abc import Mapping, Sequence
from typing import assert_never

from shoal.fleet.deployment import Deployment
from shoal.fleet.losses import shard_of, shards_of
from shoal.fleet.reconcile import Phase, broken, heard, phase, unlinked
from shoal.fleet.report import NodeReport, ShardState
from shoal.fleet.state import FleetState, Member, drained
from shoal.fleet.view import DeploymentStatus
from shoal.ids import DeploymentId, NodeId
from shoal.plan.problem import Answer, Infeasible, Plan, Stage


def phases(state: FleetState, now_s: float) -> dict[DeploymentId, Phase]:
    """Where every deployment stands."""
    reports = heard(state, now_s)
    return {n: phase(d, reports, is_drained=drained(state, n)) for n, d in state.deployments.items()}


def why_broken(state: FleetState, deployment: Deployment, now_s: float) -> str:
    """Why the plan of *deployment* cannot go on; empty when it can."""
    return broken(deployment, heard(state, now_s), is_drained=drained(state, deployment.spec.deployment))


def statuses(state: FleetState, now_s: float) -> list[DeploymentStatus]:
    """What the view says of every deployment."""
    reports, found = heard(state, now_s), phases(state, now_s)
    told = []
    for name, deployment in state.deployments.items():
        source = reports.get(deployment.spec.source)
        gateway = source.facts.gateway if source is not None else ""
        reason = named(_reason(state, deployment, now_s), state.members)
        told.append(
            DeploymentStatus(
                deployment=deployment,
                phase=found[name],
                reason=reason,
                gateway=gateway,
                first_birth=_first_birth(deployment, reports),
                busy=_busy(deployment, reports),
            )
        )
    return told


def named(text: str, members: Mapping[NodeId, Member]) -> str:
    """*text* with names for node ids: an id is 32 characters that nobody reads."""
    for node, member in members.items():
        text = text.replace(node, member.report.facts.name)
    return text


def describe_answer(answer: Answer) -> str:
    """One line about a plan, for the event log."""
    match answer:
        case Plan(stages=stages, estimate=figures):
            many = f"{len(stages)} stage{'s' if len(stages) > 1 else ''}"
            return f"{many}: {places(stages)}; {figures.time_per_output_token_s * 1000:.1f} ms per token predicted"
        case Infeasible(reason=reason):
            return f"no plan fits: {reason}"


def places(stages: Sequence[Stage]) -> str:
    """What runs where: `[0, 30) on desk, relay on box, [30, 62) on board`."""
    return ", ".join(f"{'relay' if s.is_relay else f'[{s.start}, {s.stop})'} on {s.node}" for s in stages)


def _first_birth(deployment: Deployment, reports: Mapping[NodeId, NodeReport]) -> int:
    """Which worker has the first stage; 0 while none does."""
    plan = deployment.answer
    first = shard_of(deployment, plan, 0, reports) if isinstance(plan, Plan) else None
    return first.birth if first is not None and first.state is not ShardState.FAILED else 0


def _busy(deployment: Deployment, reports: Mapping[NodeId, NodeReport]) -> tuple[float | None, ...]:
    plan = deployment.answer
    if not isinstance(plan, Plan):
        return ()
    return tuple(shard.busy_share if shard is not None else None for shard in shards_of(deployment, plan, reports))


def _under_way(deployment: Deployment, reports: Mapping[NodeId, NodeReport]) -> str:
    """What is being done about a plan that was given out, and is not broken."""
    plan, heir = deployment.answer, deployment.successor
    if isinstance(plan, Plan) and deployment.served and phase(deployment, reports) is Phase.MENDING:
        missing = unlinked(plan, shards_of(deployment, plan, reports))
        return f"{missing}; {deployment.mended}" if deployment.mended else missing
    if deployment.drowsy is not None:
        return deployment.drowsy.why
    return f"moving: {heir.why}" if heir is not None else deployment.waits


def _loading(state: FleetState, deployment: Deployment, reports: Mapping[NodeId, NodeReport]) -> str:
    """How far a plan is that has not served yet, and who has to go first."""
    plan = deployment.answer
    if not isinstance(plan, Plan) or phase(deployment, reports) is not Phase.LOADING:
        return ""
    nodes = {stage.node for stage in plan.stages} & reports.keys()
    held = {shard.shard.deployment for node in nodes for shard in reports[node].shards}
    others = {n: d for n, d in state.deployments.items() if n in held and n != deployment.spec.deployment}
    going = sorted(name for name, other in others.items() if other.asleep or other.drowsy is not None)
    missing = unlinked(plan, shards_of(deployment, plan, reports))
    return f"{missing}; it waits for the memory of {', '.join(going)}" if going else missing


def _reason(state: FleetState, deployment: Deployment, now_s: float) -> str:
    match deployment.answer:
        case Infeasible() as infeasible:
            return f"{infeasible.reason}; {infeasible.hint}" if infeasible.hint else infeasible.reason
        case None:
            return deployment.waits
        case Plan():
            reports = heard(state, now_s)
            return (
                why_broken(state, deployment, now_s)
                or _under_way(deployment, reports)
                or _loading(state, deployment, reports)
            )
        case _:
            assert_never(deployment.answer)
