"""How a deployment that is loaded on demand falls asleep and wakes: few steps, each an event that follows from where it stands.

Awake, it is planned, loaded and served like any other.  It becomes *drowsy* when it is to go: new requests are kept away, those
that run end, and when its first stage has said for a while that it answers nobody (`state.drained`), it falls *asleep*: its plan is
given up, its shards are retired.  So no answer is cut off by unloading, however old the news of a gateway are.
"""

import msgspec

from shoal.fleet.deployment import Deployment, Drowsy
from shoal.ids import DeploymentId
from shoal.plan.problem import Infeasible, Plan


class SleepBegun(msgspec.Struct, frozen=True, kw_only=True, tag="sleep_begun"):
    """The plan of *plan_epoch* is to end as soon as it answers nobody."""

    deployment: DeploymentId
    plan_epoch: int
    drowsy: Drowsy


class FellAsleep(msgspec.Struct, frozen=True, kw_only=True, tag="fell_asleep"):
    """Nothing of the deployment is wanted in memory any more; it had come to *plan_epoch*."""

    deployment: DeploymentId
    plan_epoch: int


class Woken(msgspec.Struct, frozen=True, kw_only=True, tag="woken"):
    """Somebody asks for it."""

    deployment: DeploymentId


class RoomAwaited(msgspec.Struct, frozen=True, kw_only=True, tag="room_awaited"):
    """There is no room for it yet, and *why*."""

    deployment: DeploymentId
    why: str


SleepEvent = SleepBegun | FellAsleep | Woken | RoomAwaited


def rested(old: Deployment, event: SleepEvent) -> Deployment | None:
    """*old* after a step; None for one that does not follow from where it stands."""
    replace = msgspec.structs.replace
    match event:
        case SleepBegun(plan_epoch=epoch, drowsy=drowsy):
            moves = old.successor is not None or old.former is not None or old.held
            if epoch != old.plan_epoch or moves or not isinstance(old.answer, Plan) or not old.spec.on_demand:
                return None
            return replace(old, drowsy=drowsy) if old.drowsy is None else None
        case FellAsleep(plan_epoch=epoch):
            if epoch != old.plan_epoch or old.asleep or not old.spec.on_demand:
                return None
            return Deployment(spec=old.spec, plan_epoch=epoch, asleep=True, waits=old.waits)
        case Woken():
            if old.asleep:
                return replace(old, asleep=False, waits="")
            kept = old.drowsy is not None and not old.drowsy.for_room
            return replace(old, drowsy=None) if kept else None
        case RoomAwaited(why=why):
            answer = None if isinstance(old.answer, Infeasible) else old.answer
            fresh = (why, answer) != (old.waits, old.answer)
            return replace(old, waits=why, answer=answer) if fresh and not old.asleep else None
