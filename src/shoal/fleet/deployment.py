"""A deployment and its plans: the one that serves, perhaps one that it moves to, perhaps one that it has moved from.

A move is a walk of few steps, each an event that follows from where the deployment stands: begun, (closing, where memory does not
admit both plans,) made, ended; or dropped, as long as it is not made.  At most two plans have shards at once.
"""

import msgspec

from shoal.fleet.spec import DeploymentSpec
from shoal.ids import DeploymentId, NodeId
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
    attempts: tuple[int, ...] = ()


class Standby(msgspec.Struct, frozen=True, kw_only=True):
    """A node that is to take stage *stage* over when its own is lost: it has the tensors, perhaps in a worker that waits."""

    stage: int
    node: NodeId
    attempt: int
    """Which its shard is, before and after it takes over."""
    loaded: bool = False
    memory_bytes: int = 0
    """What it holds meanwhile; nothing on disk."""


class Drowsy(msgspec.Struct, frozen=True, kw_only=True):
    """Why a model that was loaded on demand is to be unloaded."""

    why: str
    for_room: bool = False
    """Others have been promised its memory: requests that come now wait.  Else the first of them keeps it awake."""


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
    served: bool = False
    """Whether this plan has served: what is lost of it then is mended, rather than planned anew."""
    mends: int = 0
    """How often a lost stage of this plan was given to another worker, while the others went on."""
    attempts: tuple[int, ...] = ()
    """Of each stage, the least attempt that counts; empty: all are as they were begun."""
    mended: str = ""
    """Why it was mended last."""
    beyond_mending: str = ""
    """Why what it has lost cannot be given to anybody; empty where that was not tried."""
    standbys: tuple[Standby, ...] = ()
    asleep: bool = False
    """Nothing of it is loaded, and no memory is promised to it: the next request has it loaded (`fleet.demand`)."""
    drowsy: Drowsy | None = None
    """It is to fall asleep as soon as it answers nobody; None: it stays."""
    waits: str = ""
    """What it waits for to be loaded, or why that came to nothing when it was asked last."""

    def attempt_of(self, stage: int) -> int:
        """The least attempt at *stage* that counts."""
        return self.attempts[stage] if stage < len(self.attempts) else 0

    @property
    def heir(self) -> "Deployment | None":
        """The deployment as it will be after the move."""
        next_ = self.successor
        return Deployment(spec=self.spec, plan_epoch=next_.plan_epoch, answer=next_.plan) if next_ else None

    @property
    def ending(self) -> "Deployment | None":
        """The deployment as it was before the move, while answers of that plan end."""
        last = self.former
        if last is None:
            return None
        return Deployment(spec=self.spec, plan_epoch=last.plan_epoch, answer=last.plan, attempts=last.attempts)

    @property
    def plans(self) -> tuple[tuple[int, Plan, tuple[int, ...]], ...]:
        """All plans whose shards are wanted: epoch, plan, and the attempts that count."""
        found = [(self.plan_epoch, self.answer, self.attempts)] if isinstance(self.answer, Plan) else []
        if self.successor is not None:
            found.append((self.successor.plan_epoch, self.successor.plan, ()))
        if self.former is not None:
            found.append((self.former.plan_epoch, self.former.plan, self.former.attempts))
        return tuple(found)

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


class PlanServed(msgspec.Struct, frozen=True, kw_only=True, tag="plan_served"):
    """Every stage of the plan of *plan_epoch* is linked: for the first time, or again."""

    deployment: DeploymentId
    plan_epoch: int


class PlanMended(msgspec.Struct, frozen=True, kw_only=True, tag="plan_mended"):
    """The plan of *plan_epoch* goes on with other workers for what it has lost; its number of stages and their blocks stay."""

    deployment: DeploymentId
    plan_epoch: int
    mends: int
    """Counted from 1; a higher one replaces a lower one."""
    plan: Plan
    attempts: tuple[int, ...]
    why: str


class MendingEnded(msgspec.Struct, frozen=True, kw_only=True, tag="mending_ended"):
    """What the plan of *plan_epoch* has lost after *mends* mends cannot be given to anybody: another plan is needed."""

    deployment: DeploymentId
    plan_epoch: int
    mends: int
    why: str


class StandbysChosen(msgspec.Struct, frozen=True, kw_only=True, tag="standbys_chosen"):
    """Who is to take over which stage of the plan of *plan_epoch*, and has to be ready for it."""

    deployment: DeploymentId
    plan_epoch: int
    mends: int
    standbys: tuple[Standby, ...]


MendEvent = PlanServed | PlanMended | MendingEnded | StandbysChosen
MoveEvent = MoveBegun | MoveClosing | MoveMade | MoveEnded | MoveDropped


def resumed(deployment: Deployment, now_s: float) -> Deployment:
    """*deployment* as another coordinator left it, with the times that ours compares on our own clock (ADR 4)."""
    heir = deployment.successor
    if heir is None or heir.closing_s is None:
        return deployment
    return msgspec.structs.replace(deployment, successor=msgspec.structs.replace(heir, closing_s=now_s))


def mended(old: Deployment, event: MendEvent) -> Deployment | None:
    """*old* after *event*; None for one that speaks of another plan, or of one that was mended since."""
    replace = msgspec.structs.replace
    if event.plan_epoch != old.plan_epoch or not isinstance(old.answer, Plan):
        return None
    match event:
        case PlanServed():
            return replace(old, served=True, beyond_mending="") if not old.served or old.beyond_mending else None
        case PlanMended(plan=plan, attempts=attempts, mends=mends, why=why):
            if mends <= old.mends or not _same_cuts(old.answer, plan):
                return None
            used = {(stage.node, attempts[i]) for i, stage in enumerate(plan.stages)}
            left = tuple(s for s in old.standbys if (s.node, s.attempt) not in used)
            return replace(
                old, answer=plan, mends=mends, attempts=attempts, mended=why, beyond_mending="", standbys=left
            )
        case MendingEnded(mends=mends, why=why):
            return replace(old, beyond_mending=why) if mends == old.mends and not old.beyond_mending else None
        case StandbysChosen(mends=mends, standbys=standbys):
            return replace(old, standbys=standbys) if mends == old.mends and standbys != old.standbys else None


def _same_cuts(one: Plan, other: Plan) -> bool:
    return [(s.start, s.stop) for s in one.stages] == [(s.start, s.stop) for s in other.stages]


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
                former=Former(plan_epoch=old.plan_epoch, plan=old.answer, attempts=old.attempts) if drains else None,
                held=True,
                moved=heir.why,
            )
