"""Compare what a plan wants with what nodes report, and say what is missing: level-triggered, so a lost order or a lost
report delays a deployment but never derails it.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import StrEnum

import msgspec

from shoal.errors import NodeUnreachableError
from shoal.fleet.deployment import Deployment
from shoal.fleet.losses import leads_to, losses, shard_of, shards_of
from shoal.fleet.order import Hold, Order, Retire, Wire
from shoal.fleet.reading import readable
from shoal.fleet.report import NodeReport, ShardId, ShardReport, ShardState
from shoal.fleet.state import FleetState, Standing, drained, standing
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.plan.cost import kv_positions
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
    MENDING = "mending"
    """Stages of the plan are given to other workers: running requests go on when those stand, new ones wait for that."""
    RECOVERING = "recovering"
    """The plan has lost what cannot be mended: running requests end, another plan is made."""
    REFUSED = "refused"
    DROWSY = "drowsy"
    """Loaded on demand, and to be unloaded: running requests end, new ones keep it awake, or wait if others need its memory."""
    ASLEEP = "asleep"
    """Not loaded: the next request has it loaded, and waits for that."""


class Addressed(msgspec.Struct, frozen=True, kw_only=True):
    """An order and the node that it is for."""

    node: NodeId
    order: Order


def phase(deployment: Deployment, reports: Mapping[NodeId, NodeReport], *, is_drained: bool = False) -> Phase:
    """The deployment's phase, given the newest reports of the nodes that are heard; *is_drained*: see `state.drained`."""
    match deployment.answer:
        case None:
            return Phase.ASLEEP if deployment.asleep else Phase.PLANNING
        case Infeasible():
            return Phase.REFUSED
        case Plan() as plan:
            if broken(deployment, reports, is_drained=is_drained):
                return Phase.MENDING if mendable(deployment, reports) else Phase.RECOVERING
            shards = shards_of(deployment, plan, reports)
            if any(reports[s.node].leaving for s in plan.stages):
                return Phase.DRAINING
            if deployment.successor is not None and deployment.successor.closing_s is not None:
                return Phase.MOVING
            if not unlinked(plan, shards):
                return Phase.SERVING if deployment.drowsy is None else Phase.DROWSY
            if deployment.served:
                return Phase.MENDING
            return Phase.MOVING if deployment.held else Phase.LOADING


def broken(deployment: Deployment, reports: Mapping[NodeId, NodeReport], *, is_drained: bool = False) -> str:
    """Why the current plan cannot go on as it is; empty when it can."""
    plan = deployment.answer
    if not isinstance(plan, Plan):
        return ""
    lost = losses(deployment, reports)
    if lost:
        return lost[0].why
    leaving = [stage.node for stage in plan.stages if reports[stage.node].leaving]
    if leaving and (is_drained or shard_of(deployment, plan, 0, reports) is None):
        return f"node {leaving[0]} is leaving"
    return ""


def mendable(deployment: Deployment, reports: Mapping[NodeId, NodeReport]) -> bool:
    """Whether what the current plan has lost may yet be given to somebody else."""
    known = any(loss.stage is not None for loss in losses(deployment, reports))
    return known and deployment.served and not deployment.beyond_mending


def unlinked(plan: Plan, shards: Sequence[ShardReport | None]) -> str:
    """What is missing for *plan* to serve; empty when all of it is linked."""
    for index, shard in enumerate(shards):
        if shard is None or shard.state is not ShardState.WIRED:
            stands = shard.state.value if shard is not None else "not there yet"
            return f"stage {index} on {plan.stages[index].node} is {stands}"
    for index, shard in enumerate(shards):
        follower = (index + 1) % len(shards)
        if shard is not None and not leads_to(shard, shards[follower]):
            return f"stage {index} is being linked to another worker of stage {follower}"
    return ""


def missing_orders(state: FleetState, fencing_epoch: int, now_s: float) -> tuple[Addressed, ...]:
    """Every order that would bring the reported state nearer to the wanted one, in no particular order."""
    reports = heard(state, now_s)
    orders: list[Addressed] = []
    crowded = crowded_bytes(state, reports)
    for name, deployment in state.deployments.items():
        sound = not broken(deployment, reports, is_drained=drained(state, name))
        if isinstance(deployment.answer, Plan) and sound:
            full = frozenset(node for node in crowded if _has_guests(state, reports[node], name))
            orders += _towards(deployment, deployment.answer, reports, fencing_epoch, full)
    for node, report in reports.items():
        for shard in report.shards:
            owner = state.deployments.get(shard.shard.deployment)
            if not _is_wanted(owner, node, shard):
                # Of a plan that goes on: somebody else has its place, and its frames must not meet those of that one.
                superseded = owner is not None and shard.shard.plan_epoch in owner.epochs
                attempt = shard.attempt if superseded else None
                retire = Retire(fencing_epoch=fencing_epoch, shard=shard.shard, attempt=attempt)
                orders.append(Addressed(node=node, order=retire))
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
    reports: Iterable[NodeReport], deployments: Iterable[Deployment], *besides: DeploymentId
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
        names = (held.keys() | planned.keys()) - set(besides)
        promised[report.node] = sum(max(held.get(n, 0), planned.get(n, 0)) for n in names)
    return promised


def resting_bytes(state: FleetState, reports: Mapping[NodeId, NodeReport]) -> dict[NodeId, int]:
    """Memory of each node that comes back by itself: of those who are asleep, or about to be, or were dropped."""
    awake = [n for n, d in state.deployments.items() if not d.asleep and d.drowsy is None]
    return promised_bytes(reports.values(), state.deployments.values(), *awake)


def crowded_bytes(state: FleetState, reports: Mapping[NodeId, NodeReport]) -> dict[NodeId, int]:
    """By how much the nodes that are promised more than they have are so."""
    promised = promised_bytes(reports.values(), state.deployments.values())
    beyond = {node: promised[node] - report.facts.memory_budget_bytes for node, report in reports.items()}
    return {node: missing for node, missing in beyond.items() if missing > 0}


def _planned_bytes(deployment: Deployment, node: NodeId) -> int:
    """What the plans of *deployment* will take of *node*; during a move both at once, unless memory does not admit that."""
    now, then = deployment.answer, deployment.successor
    held = sum(s.memory_bytes for s in now.stages if s.node == node) if isinstance(now, Plan) else 0
    coming = sum(s.memory_bytes for s in then.plan.stages if s.node == node) if then else 0
    ready = sum(s.memory_bytes for s in deployment.standbys if s.node == node)
    return ready + (max(held, coming) if then and then.waits else held + coming)


def _towards(
    deployment: Deployment,
    plan: Plan,
    reports: Mapping[NodeId, NodeReport],
    fencing_epoch: int,
    full: Collection[NodeId],
) -> list[Addressed]:
    """Orders for *plan*; on nodes that are *full* of what has to go first, shards are fetched and wait."""
    count = len(plan.stages)
    shards = shards_of(deployment, plan, reports)
    orders: list[Addressed] = []
    for index, stage in enumerate(plan.stages):
        shard = shards[index]
        follower = shards[(index + 1) % count]
        if shard is None or (shard.state is ShardState.FETCHED and stage.node not in full):
            hold = hold_order(deployment, plan, index, reports, fencing_epoch)
            told = msgspec.structs.replace(hold, load=stage.node not in full)
            orders.append(Addressed(node=stage.node, order=told))
        elif _is_to_be_wired(shard, follower):
            assert follower is not None
            orders.append(wire_order(plan, index, shard.shard, follower, fencing_epoch))
    return orders


def _has_guests(state: FleetState, report: NodeReport, besides: DeploymentId) -> bool:
    """Whether a node holds something that may be made to go, or is on its way."""
    names = {shard.shard.deployment for shard in report.shards} - {besides}
    return any(n not in state.deployments or state.deployments[n].spec.on_demand for n in names)


def _is_to_be_wired(shard: ShardReport, follower: ShardReport | None) -> bool:
    if follower is None or not follower.locators or follower.state is ShardState.FAILED:
        return False
    return shard.state is ShardState.READY or (shard.state is ShardState.WIRED and not leads_to(shard, follower))


def wire_order(plan: Plan, index: int, shard: ShardId, follower: ShardReport, fencing_epoch: int) -> Addressed:
    """Have stage *index* of *plan* send to the worker that *follower* reports."""
    wire = Wire(
        fencing_epoch=fencing_epoch,
        shard=shard,
        next_node=plan.stages[(index + 1) % len(plan.stages)].node,
        next_locators=follower.locators,
        next_birth=follower.birth,
    )
    return Addressed(node=plan.stages[index].node, order=wire)


def hold_order(
    deployment: Deployment, plan: Plan, index: int, reports: Mapping[NodeId, NodeReport], fencing_epoch: int
) -> Hold:
    """Have stage *index* of the plan of *deployment* fetched and loaded."""
    stage, spec = plan.stages[index], deployment.spec
    ends = {stage.node, plan.stages[(index + 1) % len(plan.stages)].node}
    facts = [report.facts for node, report in reports.items() if node in ends]
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
        attempt=deployment.attempt_of(index),
        recovery=spec.recovery,
        speculation=spec.speculation,
        draft=spec.draft if index == 0 else Digest(""),
        activations=readable(stage.writes if spec.activations_per_cut else spec.activations, facts),
        cache_tokens=kv_positions(plan.shape),
    )


def _is_wanted(deployment: Deployment | None, node: NodeId, shard: ShardReport) -> bool:
    """Whether a plan of *deployment* wants this shard there: not one that another attempt has taken the place of."""
    if deployment is None:
        return False
    epoch, index = shard.shard.plan_epoch, shard.shard.stage
    if deployment.answer is None:
        # The plan before answers until another is made; of one that is loaded on demand it was given up.
        return epoch == deployment.plan_epoch and not deployment.spec.on_demand
    for plan_epoch, plan, attempts in deployment.plans:
        if plan_epoch == epoch and index < len(plan.stages) and plan.stages[index].node == node:
            return shard.attempt >= (attempts[index] if attempts else 0)
    standbys = deployment.standbys if epoch == deployment.plan_epoch else ()
    return any((s.stage, s.node) == (index, node) and shard.attempt >= s.attempt for s in standbys)
