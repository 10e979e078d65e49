"""What is to be done about what a plan has lost: the same node again, another one, or another plan.

A worker that ended may have been unlucky: its node starts it again, at once and without a plan, as long as that has not been tried
too often.  A stage whose node is gone, or cannot have it again, goes to whichever node the planner finds when all other stages stay
where they are (`wish`): they keep their weights, and only one shard is loaded.  Where nobody has room for it, another plan is made.
"""

from collections.abc import Mapping
from itertools import islice, permutations

import msgspec

from shoal.fleet.deployment import Deployment, PlanMended
from shoal.fleet.losses import losses
from shoal.fleet.report import NodeReport
from shoal.fleet.spec import DeploymentSpec
from shoal.ids import NodeId
from shoal.plan.problem import Choose, Pin, Plan, Stage

MOST_IN_PLACE = 3
"""So often a node starts a stage of one plan again; what takes it down may be the node's own."""
MOST_MENDS = 8
"""Of one plan: then it is thought out anew, from all that is known by then."""

MOST_TRIED = 8
"""Ways to give away lost stages as they are cut; each is planned for, while requests wait."""


class Mend(msgspec.Struct, frozen=True, kw_only=True):
    """The next mend of a plan: attempts of all stages, and those that their nodes must not have again."""

    attempts: tuple[int, ...]
    elsewhere: tuple[int, ...]
    why: str


class Beyond(msgspec.Struct, frozen=True, kw_only=True):
    """Why another plan is needed."""

    why: str


def next_mend(deployment: Deployment, reports: Mapping[NodeId, NodeReport]) -> Mend | Beyond:
    """What to do about the losses of the current plan of *deployment*, which has some."""
    plan = deployment.answer
    assert isinstance(plan, Plan)
    lost = losses(deployment, reports)
    stages = {loss.stage: loss for loss in lost if loss.stage is not None}
    why = lost[0].why
    if len(stages) < len(lost):
        return Beyond(why=why)
    if deployment.successor is not None or deployment.former is not None:
        return Beyond(why=f"{why}, in the middle of a move")
    if deployment.mends >= MOST_MENDS:
        return Beyond(why=f"{why}; this plan was mended {deployment.mends} times")
    attempts = tuple(deployment.attempt_of(i) + (i in stages) for i in range(len(plan.stages)))
    elsewhere = tuple(
        index
        for index, loss in sorted(stages.items())
        if loss.barred or attempts[index] > MOST_IN_PLACE or not _may_again(reports[plan.stages[index].node])
    )
    if any(plan.stages[index].is_relay for index in elsewhere):
        return Beyond(why=f"{why}; it relays, and others may not need it")
    if 0 in elsewhere:
        return Beyond(why=f"{why}; the first stage belongs to the source")
    return Mend(attempts=attempts, elsewhere=elsewhere, why=why)


def wish(deployment: Deployment, mend: Mend) -> DeploymentSpec:
    """What to ask the planner for: everything as it is but for the stages that go elsewhere, and not where they were."""
    plan = deployment.answer
    assert isinstance(plan, Plan)
    kept = [stage for index, stage in enumerate(plan.stages) if index not in mend.elsewhere]
    known = {pin.block for pin in deployment.spec.pins}
    pins = tuple(Pin(block=block, node=s.node) for s in kept for block in range(s.start, s.stop) if block not in known)
    return msgspec.structs.replace(
        deployment.spec,
        shape=plan.shape,  # the caches of those that stay are of this shape
        choose=Choose(),
        stages_exactly=len(plan.stages),
        pins=deployment.spec.pins + pins,
        exclude=(*deployment.spec.exclude, *(plan.stages[index].node for index in mend.elsewhere)),
    )


def wishes_as_cut(deployment: Deployment, mend: Mend, free_bytes: Mapping[NodeId, int]) -> tuple[DeploymentSpec, ...]:
    """The same wish for each way to give the stages as they are cut to nodes with *free_bytes*, those with most first.

    Asked freely, the planner may find that a stage that stays should rather take some of the lost blocks: that is another plan.
    """
    plan, wished = deployment.answer, wish(deployment, mend)
    assert isinstance(plan, Plan)
    taken = {stage.node for stage in plan.stages} | set(wished.exclude)
    others = sorted((node for node in free_bytes if node not in taken), key=lambda node: (-free_bytes[node], node))
    known = {pin.block for pin in wished.pins}
    lost = [plan.stages[index] for index in mend.elsewhere]
    return tuple(
        msgspec.structs.replace(
            wished,
            pins=wished.pins
            + tuple(
                Pin(block=block, node=node)
                for stage, node in zip(lost, nodes, strict=True)
                for block in range(stage.start, stage.stop)
                if block not in known
            ),
        )
        for nodes in islice(permutations(others, len(lost)), MOST_TRIED)
    )


def mended_plan(deployment: Deployment, mend: Mend, found: Plan) -> PlanMended | Beyond:
    """The step that puts *found*, the answer to the wish, in the place of the plan that lost something.

    Its figures are still those of *found*: where the two write differently (`as_found`), it must be priced anew.
    """
    plan = deployment.answer
    assert isinstance(plan, Plan)
    barred = {plan.stages[index].node for index in mend.elsewhere}
    same = len(found.stages) == len(plan.stages) and all(
        (new.start, new.stop) == (old.start, old.stop)
        and (new.node not in barred if index in mend.elsewhere else new.node == old.node)
        for index, (new, old) in enumerate(zip(found.stages, plan.stages, strict=True))
    )
    if not same or found.shape != plan.shape:  # a plan that was made before may count on smaller caches everywhere
        return Beyond(why=f"{mend.why}; nobody can take its blocks as they are cut")
    # How a stage writes was told it when it was loaded.
    stages = tuple(
        new if index in mend.elsewhere else msgspec.structs.replace(new, writes=old.writes)
        for index, (new, old) in enumerate(zip(found.stages, plan.stages, strict=True))
    )
    written = tuple(one for one in plan.written if one.stage not in mend.elsewhere)
    written += tuple(one for one in found.written if one.stage in mend.elsewhere)
    by_stage = tuple(sorted(written, key=lambda one: one.stage))
    return step(deployment, mend, msgspec.structs.replace(found, stages=stages, written=by_stage))


def as_found(mended: Plan, found: Plan) -> bool:
    """Whether the figures of *found* are those of *mended* too."""
    return mended.stages == found.stages


def step(deployment: Deployment, mend: Mend, plan: Plan) -> PlanMended:
    """*mend* as a step of *deployment*, which goes on with *plan*."""
    moved = ", ".join(_goes(index, plan.stages[index]) for index in mend.elsewhere)
    return PlanMended(
        deployment=deployment.spec.deployment,
        plan_epoch=deployment.plan_epoch,
        mends=deployment.mends + 1,
        plan=plan,
        attempts=mend.attempts,
        why=f"{mend.why}; {moved or 'it is started again'}",
    )


def _may_again(report: NodeReport) -> bool:
    """Whether a node can start a stage again that ended there: not one of an older release, nor one that is about to leave."""
    return report.facts.mends and not report.leaving


def _goes(index: int, stage: Stage) -> str:
    return f"stage {index} goes to {stage.node}"
