"""Moving a deployment that serves to another plan, step by step, by `plan.transition`: level-triggered like everything else.

`transition` says what is left to do, from the reports alone.  What comes before the break is ordered while the old plan answers:
shards are fetched, loaded and wired beside its own.  When all of the new pipeline is wired, new requests go to it, the old one ends
its answers, and is retired.  Where memory leaves a gap, new requests wait at the gateway from *closing* on, until the old pipeline
is drained and retired and the new one stands; answers that take too long to wait for end the attempt, not themselves.

Whatever happens to the successor, the plan that serves goes on serving; and a successor that is sound takes over at once when the
old plan breaks.
"""

from collections.abc import Iterator, Mapping, Sequence

from msgspec.structs import replace

from shoal.fleet.deployment import Deployment, MoveClosing, MoveDropped, MoveEnded, MoveEvent, MoveMade, Successor
from shoal.fleet.losses import shard_of
from shoal.fleet.reconcile import (
    Addressed,
    Phase,
    broken,
    heard,
    hold_order,
    phase,
    promised_bytes,
    wire_order,
)
from shoal.fleet.report import NodeReport, ShardReport, ShardState
from shoal.fleet.state import FleetState, drained
from shoal.ids import NodeId
from shoal.plan.problem import Infeasible, Plan
from shoal.plan.transition import Actual, Fetch, Link, Load, Piece, Progress, Transition, pieces_of, transition

CLOSE_AT_MOST_S = 20.0
"""So long may new requests wait for the answers under way, before the move is put off."""

PROGRESS = {
    ShardState.FETCHING: Progress.NONE,
    ShardState.FETCHED: Progress.FETCHED,
    ShardState.LOADING: Progress.FETCHED,
    ShardState.READY: Progress.LOADED,
    ShardState.WIRED: Progress.LINKED,
    ShardState.FAILED: Progress.NONE,
}


def towards(
    state: FleetState, deployment: Deployment, wanted: Sequence[Piece], reports: Mapping[NodeId, NodeReport]
) -> Transition | Infeasible:
    """What is left to do until *wanted* serves in place of the current plan of *deployment*."""
    name = deployment.spec.deployment
    promised = promised_bytes(reports.values(), state.deployments.values(), name)
    actual = Actual(
        pieces=tuple(_pieces(deployment, reports)),
        memory_bytes={n: max(0, r.facts.memory_budget_bytes - promised[n]) for n, r in reports.items()},
        serving=deployment.plan_epoch,
    )
    return transition(actual, wanted)


def due(state: FleetState, now_s: float) -> tuple[MoveEvent, ...]:
    """The next step of each move that can be taken now."""
    reports = heard(state, now_s)
    steps = (_step(state, deployment, reports, now_s) for deployment in state.deployments.values())
    return tuple(step for step in steps if step is not None)


def move_orders(state: FleetState, fencing_epoch: int, now_s: float) -> tuple[Addressed, ...]:
    """Orders that bring successors nearer while the plans before them serve."""
    reports = heard(state, now_s)
    orders: list[Addressed] = []
    for deployment in state.deployments.values():
        next_ = deployment.successor
        if next_ is not None and not broken(deployment, reports):
            change = towards(state, deployment, pieces_of(next_.plan, next_.plan_epoch), reports)
            if isinstance(change, Transition):
                orders += _orders(deployment, change, reports, fencing_epoch)
    return tuple(orders)


def _step(
    state: FleetState, deployment: Deployment, reports: Mapping[NodeId, NodeReport], now_s: float
) -> MoveEvent | None:
    name = deployment.spec.deployment
    if deployment.successor is not None:
        return _next(state, deployment, deployment.successor, reports, now_s)
    ended = MoveEnded(deployment=name, plan_epoch=deployment.plan_epoch)
    if deployment.ending is not None:
        return ended if drained(state, name, former=True) or broken(deployment.ending, reports) else None
    return ended if deployment.held and phase(deployment, reports) is Phase.SERVING else None


def _next(
    state: FleetState,
    deployment: Deployment,
    successor: Successor,
    reports: Mapping[NodeId, NodeReport],
    now_s: float,
) -> MoveEvent | None:
    name, epoch, heir = deployment.spec.deployment, successor.plan_epoch, deployment.heir
    assert heir is not None

    def dropped(why: str) -> MoveDropped:
        return MoveDropped(deployment=name, plan_epoch=epoch, why=why)

    def made(*, drains: bool) -> MoveMade:
        return MoveMade(deployment=name, plan_epoch=epoch, at_s=now_s, drains=drains)

    stands = phase(heir, reports)
    if stands in {Phase.RECOVERING, Phase.DRAINING}:
        return dropped(broken(heir, reports) or "a node of the new plan is leaving")
    if broken(deployment, reports, is_drained=drained(state, name)):
        return made(drains=False)
    change = towards(state, deployment, pieces_of(successor.plan, epoch), reports)
    if isinstance(change, Infeasible):
        return dropped(change.reason)
    if stands is Phase.SERVING:
        return made(drains=True)
    if successor.closing_s is None:
        ready = change.gap is not None and not change.until_the_break(deployment.plan_epoch)
        return MoveClosing(deployment=name, plan_epoch=epoch, at_s=now_s) if ready else None
    if drained(state, name):
        return made(drains=False)
    late = now_s - successor.closing_s > CLOSE_AT_MOST_S
    return (
        dropped(f"answers took longer than the {CLOSE_AT_MOST_S:g} s that others may wait for them") if late else None
    )


def _pieces(deployment: Deployment, reports: Mapping[NodeId, NodeReport]) -> Iterator[tuple[Piece, Progress]]:
    """Everything that nodes hold of *deployment*, of whatever plan."""
    for node, report in reports.items():
        for shard in report.shards:
            if shard.shard.deployment == deployment.spec.deployment:
                yield _piece(node, shard), PROGRESS[shard.state]


def _piece(node: NodeId, shard: ShardReport) -> Piece:
    return Piece(
        plan_epoch=shard.shard.plan_epoch,
        stage=shard.shard.stage,
        node=node,
        start=shard.start,
        stop=shard.stop,
        memory_bytes=shard.memory_bytes,
    )


def _orders(
    deployment: Deployment, change: Transition, reports: Mapping[NodeId, NodeReport], fencing_epoch: int
) -> Iterator[Addressed]:
    """What may be done of *change* before the break; whoever is at it already needs no word."""
    heir = deployment.heir
    assert heir is not None
    assert isinstance(heir.answer, Plan)
    plan, before = heir.answer, change.until_the_break(deployment.plan_epoch)
    loaded = {action.piece for action in before if isinstance(action, Load)}
    for action in before:
        index = action.piece.stage
        shard, follower = (shard_of(heir, plan, i % len(plan.stages), reports) for i in (index, index + 1))
        state = shard.state if shard is not None else None
        match action:
            case Fetch() | Load() if state is None or (state is ShardState.FETCHED and action.piece in loaded):
                hold = hold_order(heir, plan, index, reports, fencing_epoch)
                told = replace(hold, load=action.piece in loaded, beside=(deployment.plan_epoch,))
                yield Addressed(node=action.piece.node, order=told)
            case Link() if shard is not None and state is ShardState.READY and follower and follower.locators:
                yield wire_order(plan, index, shard.shard, follower, fencing_epoch)
            case _:
                pass  # under way; or of neither plan, which `missing_orders` sees to
