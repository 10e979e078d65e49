"""Compare what a plan wants with what nodes report, and say what is missing: level-triggered, so a lost order or a lost
report delays a deployment but never derails it.
"""

from collections.abc import Iterable, Mapping
from enum import StrEnum

import msgspec

from shoal.errors import NodeUnreachableError
from shoal.fleet.deployment import Deployment
from shoal.fleet.order import Hold, Order, Retire, Wire
from shoal.fleet.report import NodeReport, ShardId, ShardReport, ShardState
from shoal.fleet.state import FleetState, Standing, drained, standing
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.plan.problem import Infeasible, Plan


class Phase(StrEnum):
    """Where a deployment stands."""

    PLANNING = "planning"
    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"
    """A node of the plan is leaving: running requests end, new ones are asked to come again (503 with Retry-After)."""
    MOVING = "moving"
    """Memory does not admit this plan and the next at once: running requests end, new ones wait for the next (`fleet.moves`)."""
    RECOVERING = "recovering"
    REFUSED = "refused"


class Addressed(msgspec.Struct, frozen=True, kw_only=True):
    """An order and the node that it is for."""

    node: NodeId
    order: Order


def phase(deployment: Deployment, reports: Mapping[NodeId, NodeReport], *, is_drained: bool = False) -> Phase:
    """The deployment's phase, given the newest reports of the nodes that are heard; *is_drained*: see `state.drained`."""
    match deployment.answer:
        case None:
            return Phase.PLANNING
        case Infeasible():
            return Phase.REFUSED
        case Plan() as plan:
            if broken(deployment, reports, is_drained=is_drained):
                return Phase.RECOVERING
            shards = [shard_of(deployment, plan, i, reports) for i in range(len(plan.stages))]
            if any(reports[s.node].leaving for s in plan.stages):
                return Phase.DRAINING
            if deployment.successor is not None and deployment.successor.closing_s is not None:
                return Phase.MOVING
            if all(s is not None and s.state is ShardState.WIRED for s in shards):
                return Phase.SERVING
            return Phase.MOVING if deployment.held else Phase.LOADING


def broken(deployment: Deployment, reports: Mapping[NodeId, NodeReport], *, is_drained: bool = False) -> str:
    """Why the current plan cannot go on and another is needed; empty when it can."""
    plan = deployment.answer
    if not isinstance(plan, Plan):
        return ""
    for index, stage in enumerate(plan.stages):
        if stage.node not in reports:
            return f"node {stage.node} of stage {index} is gone"
        shard = shard_of(deployment, plan, index, reports)
        if shard is not None and shard.state is ShardState.FAILED:
            return f"stage {index} on {stage.node} failed: {shard.error}"
    shards = [shard_of(deployment, plan, i, reports) for i in range(len(plan.stages))]
    leaving = [stage.node for stage in plan.stages if reports[stage.node].leaving]
    if leaving and (is_drained or shards[0] is None):
        return f"node {leaving[0]} is leaving"
    for index, shard in enumerate(shards):
        follower = (index + 1) % len(shards)
        if shard is not None and _suffers(shard, shards[follower]):
            return f"stage {index} on {plan.stages[index].node} says: {shard.error}"
        if shard is not None and shard.state is ShardState.WIRED and not _leads_to(shard, shards[follower]):
            # It sends to a worker that is no more: the node of its follower was restarted.
            return f"stage {follower} lost its worker"
    return ""


def missing_orders(state: FleetState, fencing_epoch: int, now_s: float) -> tuple[Addressed, ...]:
    """Every order that would bring the reported state nearer to the wanted one, in no particular order."""
    reports = heard(state, now_s)
    orders: list[Addressed] = []
    for name, deployment in state.deployments.items():
        sound = not broken(deployment, reports, is_drained=drained(state, name))
        if isinstance(deployment.answer, Plan) and sound:
            orders += _towards(deployment, deployment.answer, reports, fencing_epoch)
    wanted = {n: d.epochs for n, d in state.deployments.items()}
    for node, report in reports.items():
        orders += [
            Addressed(node=node, order=Retire(fencing_epoch=fencing_epoch, shard=s.shard))
            for s in _stale(report.shards, wanted)
        ]
    return tuple(orders)


def heard(state: FleetState, now_s: float) -> dict[NodeId, NodeReport]:
    """Newest reports of the nodes that are not lost."""
    return {n: m.report for n, m in state.members.items() if standing(m, now_s) is not Standing.LOST}


def sources(
    manifest: Digest, reports: Mapping[NodeId, NodeReport], *, asker: NodeId, source: NodeId
) -> tuple[NodeId, ...]:
    """Whom *asker* asks for chunks of a model, in this order: complete holders, its *source*, everybody else who is heard.

    Reports say who holds a model complete, not who holds which chunk: listing thousands of digests twice a second would cost
    more than asking a node in vain does, which is one round trip.  A source that is not heard comes last: to ask it may cost
    a timeout.
    """
    complete = [node for node, report in reports.items() if manifest in report.manifests]
    partly = [source, *reports] if source in reports else [*reports, source]
    return tuple(node for node in dict.fromkeys(complete + partly) if node != asker)


def cut_pairs(reports: Iterable[NodeReport]) -> frozenset[tuple[NodeId, NodeId]]:
    """Who cannot dial whom, by the word of workers that have tried: no plan should count on such a link."""
    code = NodeUnreachableError.code
    said = [(report.node, shard) for report in reports for shard in report.shards if shard.error_code == code]
    return frozenset((node, shard.next_node) for node, shard in said if shard.next_node is not None)


def promised_bytes(
    reports: Iterable[NodeReport], deployments: Iterable[Deployment], besides: DeploymentId
) -> dict[NodeId, int]:
    """Memory of each node that is not for *besides*: what others hold there, or what their plans will, whichever is more."""
    others = {d.spec.deployment: d for d in deployments}
    promised: dict[NodeId, int] = {}
    for report in reports:
        held: dict[DeploymentId, int] = {}
        for shard in report.shards:
            if shard.state is not ShardState.FAILED:
                name = shard.shard.deployment
                held[name] = held.get(name, 0) + shard.memory_bytes
        planned = {n: _planned_bytes(d, report.node) for n, d in others.items()}
        names = (held.keys() | planned.keys()) - {besides}
        promised[report.node] = sum(max(held.get(n, 0), planned.get(n, 0)) for n in names)
    return promised


def _planned_bytes(deployment: Deployment, node: NodeId) -> int:
    """What the plans of *deployment* will take of *node*; during a move both at once, unless memory does not admit that."""
    now, then = deployment.answer, deployment.successor
    held = sum(s.memory_bytes for s in now.stages if s.node == node) if isinstance(now, Plan) else 0
    coming = sum(s.memory_bytes for s in then.plan.stages if s.node == node) if then else 0
    return max(held, coming) if then and then.waits else held + coming


def _towards(
    deployment: Deployment, plan: Plan, reports: Mapping[NodeId, NodeReport], fencing_epoch: int
) -> list[Addressed]:
    count = len(plan.stages)
    shards = [shard_of(deployment, plan, i, reports) for i in range(count)]
    orders: list[Addressed] = []
    for index, stage in enumerate(plan.stages):
        shard = shards[index]
        follower = shards[(index + 1) % count]
        if shard is None or shard.state is ShardState.FETCHED:
            hold = hold_order(deployment, plan, index, reports, fencing_epoch)
            orders.append(Addressed(node=stage.node, order=hold))
        elif shard.state is ShardState.READY and follower is not None and follower.locators:
            orders.append(wire_order(plan, index, shard.shard, follower, fencing_epoch))
    return orders


def wire_order(plan: Plan, index: int, shard: ShardId, follower: ShardReport, fencing_epoch: int) -> Addressed:
    """Have stage *index* of *plan* send to the worker that *follower* reports."""
    wire = Wire(
        fencing_epoch=fencing_epoch,
        shard=shard,
        next_node=plan.stages[(index + 1) % len(plan.stages)].node,
        next_locators=follower.locators,
    )
    return Addressed(node=plan.stages[index].node, order=wire)


def hold_order(
    deployment: Deployment, plan: Plan, index: int, reports: Mapping[NodeId, NodeReport], fencing_epoch: int
) -> Hold:
    """Have stage *index* of the plan of *deployment* fetched and loaded."""
    stage, spec = plan.stages[index], deployment.spec
    return Hold(
        fencing_epoch=fencing_epoch,
        shard=ShardId(deployment=spec.deployment, plan_epoch=deployment.plan_epoch, stage=index),
        stages=len(plan.stages),
        manifest=spec.manifest,
        start=stage.start,
        stop=stage.stop,
        slots=plan.shape.slots,
        context_tokens=plan.shape.context_tokens,
        in_flight=plan.shape.in_flight,
        memory_bytes=stage.memory_bytes,
        sources=sources(spec.manifest, reports, asker=stage.node, source=spec.source),
        beside=tuple(epoch for epoch in deployment.epochs if epoch != deployment.plan_epoch),
    )


def shard_of(
    deployment: Deployment, plan: Plan, index: int, reports: Mapping[NodeId, NodeReport]
) -> ShardReport | None:
    """What the node of stage *index* reports of that shard."""
    report = reports.get(plan.stages[index].node)
    if report is None:
        return None
    wanted = ShardId(deployment=deployment.spec.deployment, plan_epoch=deployment.plan_epoch, stage=index)
    return next((s for s in report.shards if s.shard == wanted), None)


def _leads_to(shard: ShardReport, follower: ShardReport | None) -> bool:
    """Whether a wired shard sends to the worker that *follower* reports (a node that does not say where is believed)."""
    return follower is not None and (not shard.wired_to or shard.wired_to == follower.locators)


def _suffers(shard: ShardReport, follower: ShardReport | None) -> bool:
    """Whether a shard sees the pipeline not work; one that dials where nobody listens yet only waits."""
    if not shard.error_code:
        return False
    listens = follower is not None and follower.locators == shard.wired_to
    return shard.state is ShardState.WIRED or (shard.state is ShardState.READY and listens)


def _stale(shards: Iterable[ShardReport], wanted: Mapping[DeploymentId, tuple[int, ...]]) -> list[ShardReport]:
    return [s for s in shards if s.shard.plan_epoch not in wanted.get(s.shard.deployment, ())]
