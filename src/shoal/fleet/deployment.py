"""A deployment and its plans: the one that serves, perhaps one that it moves to, perhaps one that it has moved from.

A move is a walk of few steps, each an event that follows from where the deployment stands: begun, (closing, where memory does not
admit both plans,) made, ended; or dropped, as long as it is not made.  At most two plans have shards at once.
"""

import msgspec

from shoal.fleet.spec import DeploymentSpec
from shoal.ids import DeploymentId
from shoal.plan.problem import Answer, Plan


class Successor(msgspec.Struct, frozen=True, kw_only=True):
    """The plan that a deployment is moving to, beside the one that serves."""

    plan_epoch: int
    plan: Plan
    why: str
    """What is gained and what it costs, in a line."""
    waits: bool = False
    """Memory does not admit both plans: the old one has to go before the new one is whole."""
    closing_s: float | None = None
    """Since when new requests wait for that, on the coordinator's clock."""


class Former(msgspec.Struct, frozen=True, kw_only=True):
    """The plan that a deployment has moved from, while it ends its answers."""

    plan_epoch: int
    plan: Plan


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """What is wanted and the plan made for it; `plan_epoch` 0 means that none was made yet."""

    spec: DeploymentSpec
    plan_epoch: int = 0
    answer: Answer | None = None
    planned_s: float = 0.0
    successor: Successor | None = None
    former: Former | None = None
    held: bool = False
    """New requests wait until this plan serves, rather than being refused: it took the place of one that served."""
    moved: str = ""
    """Why this plan replaced one that served; empty for one that replaced nothing or something broken."""

    @property
    def heir(self) -> "Deployment | None":
        """The deployment as it will be after the move."""
        next_ = self.successor
        return Deployment(spec=self.spec, plan_epoch=next_.plan_epoch, answer=next_.plan) if next_ else None

    @property
    def ending(self) -> "Deployment | None":
        """The deployment as it was before the move, while answers of that plan end."""
        last = self.former
        return Deployment(spec=self.spec, plan_epoch=last.plan_epoch, answer=last.plan) if last else None

    @property
    def epochs(self) -> tuple[int, ...]:
        """Of all plans whose shards are wanted."""
        others = (self.successor, self.former)
        return (self.plan_epoch, *(other.plan_epoch for other in others if other is not None))


class MoveBegun(msgspec.Struct, frozen=True, kw_only=True, tag="move_begun"):
    """The deployment is to move from the plan of *from_epoch*, which serves, to another."""

    deployment: DeploymentId
    from_epoch: int
    successor: Successor


class MoveClosing(msgspec.Struct, frozen=True, kw_only=True, tag="move_closing"):
    """New requests wait from now on, so that the old plan comes to its end."""

    deployment: DeploymentId
    plan_epoch: int
    at_s: float


class MoveMade(msgspec.Struct, frozen=True, kw_only=True, tag="move_made"):
    """New requests go to the successor.  *drains*: the old plan goes on with its answers."""

    deployment: DeploymentId
    plan_epoch: int
    at_s: float
    drains: bool = True


class MoveEnded(msgspec.Struct, frozen=True, kw_only=True, tag="move_ended"):
    """The new plan serves, and nothing is left of the old one."""

    deployment: DeploymentId
    plan_epoch: int


class MoveDropped(msgspec.Struct, frozen=True, kw_only=True, tag="move_dropped"):
    """The successor came to nothing; the plan that serves stays."""

    deployment: DeploymentId
    plan_epoch: int
    why: str


MoveEvent = MoveBegun | MoveClosing | MoveMade | MoveEnded | MoveDropped


def resumed(deployment: Deployment, now_s: float) -> Deployment:
    """*deployment* as another coordinator left it, with the times that ours compares on our own clock (ADR 4)."""
    heir = deployment.successor
    if heir is None or heir.closing_s is None:
        return deployment
    return msgspec.structs.replace(deployment, successor=msgspec.structs.replace(heir, closing_s=now_s))


def moved(old: Deployment, event: MoveEvent) -> Deployment | None:
    """*old* after a step of a move; None for one that does not follow from where it stands."""
    replace, heir = msgspec.structs.replace, old.successor
    if isinstance(event, MoveBegun):
        fresh = event.from_epoch == old.plan_epoch < event.successor.plan_epoch
        if not fresh or heir is not None or old.former is not None or not isinstance(old.answer, Plan):
            return None
        return replace(old, successor=event.successor)
    if isinstance(event, MoveEnded):
        ends = event.plan_epoch == old.plan_epoch and (old.held or old.former is not None)
        return replace(old, former=None, held=False) if ends else None
    if heir is None or heir.plan_epoch != event.plan_epoch or not isinstance(old.answer, Plan):
        return None
    match event:
        case MoveDropped():
            return replace(old, successor=None)
        case MoveClosing(at_s=at_s):
            return replace(old, successor=replace(heir, closing_s=at_s)) if heir.closing_s is None else None
        case MoveMade(at_s=at_s, drains=drains):
            return Deployment(
                spec=old.spec,
                plan_epoch=heir.plan_epoch,
                answer=heir.plan,
                planned_s=at_s,
                former=Former(plan_epoch=old.plan_epoch, plan=old.answer) if drains else None,
                held=True,
                moved=heir.why,
            )
