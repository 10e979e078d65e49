"""What a plan that was given out has lost: which stages, why, and whether their nodes may have them again.

A stage is lost when its node is not heard, when its shard has failed, or when another stage says so: it sees silence, a frozen
neighbour or a cut link, and garbage, which nobody else does.  What a stage says counts only of the worker that it speaks of, or a
worker that was replaced would go on being blamed.

A stage whose worker is merely another one than its neighbour was wired to (its node was started again) is not lost: it is wired
anew, and brought to where its predecessor was.
"""

from collections.abc import Iterator, Mapping

import msgspec

from shoal.errors import NodeUnreachableError, ShardLostError
from shoal.fleet.deployment import Deployment
from shoal.fleet.report import NodeReport, ShardId, ShardReport, ShardState
from shoal.ids import NodeId
from shoal.plan.problem import Plan


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """A stage that does not work, and why.  *stage* is None where something hangs and nobody can tell what."""

    stage: int | None
    why: str
    barred: bool = False
    """Its node must not have it again: it is gone, or has no room, or no chunks."""
    cut: tuple[NodeId, NodeId] | None = None
    """Frames do not pass from the one to the other, as far as one end can tell."""


def losses(deployment: Deployment, reports: Mapping[NodeId, NodeReport]) -> tuple[Loss, ...]:
    """What the current plan of *deployment* has lost, at most once per stage."""
    plan = deployment.answer
    if not isinstance(plan, Plan):
        return ()
    shards = shards_of(deployment, plan, reports)
    found: dict[int | None, Loss] = {}
    for index, stage in enumerate(plan.stages):
        if stage.node not in reports:
            found[index] = Loss(stage=index, why=f"node {stage.node} of stage {index} is gone", barred=True)
            continue
        shard = shards[index]
        if shard is not None and shard.state is ShardState.FAILED:
            # That a worker has ended may be bad luck; whoever could not even load it will not the next time.
            ended = shard.error_code == ShardLostError.code
            said = f"stage {index} on {stage.node} failed: {shard.error}"
            found[index] = Loss(stage=index, why=said, barred=not ended)
    for loss in _blamed(plan, shards):
        found.setdefault(loss.stage, loss)
    return tuple(found.values())


def shards_of(
    deployment: Deployment, plan: Plan, reports: Mapping[NodeId, NodeReport]
) -> tuple[ShardReport | None, ...]:
    """What the nodes of *plan* report of its stages."""
    return tuple(shard_of(deployment, plan, index, reports) for index in range(len(plan.stages)))


def shard_of(
    deployment: Deployment, plan: Plan, index: int, reports: Mapping[NodeId, NodeReport]
) -> ShardReport | None:
    """What the node of stage *index* reports of that shard; of an earlier attempt at it, nothing is said."""
    report = reports.get(plan.stages[index].node)
    if report is None:
        return None
    wanted = ShardId(deployment=deployment.spec.deployment, plan_epoch=deployment.plan_epoch, stage=index)
    least = deployment.attempt_of(index)
    return next((s for s in report.shards if s.shard == wanted and s.attempt >= least), None)


def leads_to(shard: ShardReport, follower: ShardReport | None) -> bool:
    """Whether a wired shard sends to the worker that *follower* reports (a node that does not say where is believed)."""
    if follower is None:
        return False
    if shard.wired_birth and follower.birth and shard.wired_birth != follower.birth:
        return False
    return not shard.wired_to or shard.wired_to == follower.locators


def _blamed(plan: Plan, shards: tuple[ShardReport | None, ...]) -> Iterator[Loss]:
    for index, shard in enumerate(shards):
        if shard is None or not shard.error_code:
            continue
        here, after = plan.stages[index].node, (index + 1) % len(shards)
        said = f"stage {index} on {here} says: {shard.error}"
        if shard.blames is not None and shard.blames != after:
            yield from _accused(shard, shards, said)
        elif _suffers(shard, shards[after]):
            there = plan.stages[after].node
            barred = shard.error_code == NodeUnreachableError.code
            yield Loss(stage=after, why=said, barred=barred, cut=(here, there) if here != there else None)


def _accused(shard: ShardReport, shards: tuple[ShardReport | None, ...], said: str) -> Iterator[Loss]:
    """The stage that *shard* names, unless it speaks of a worker that is no more."""
    assert shard.blames is not None
    if shard.blames not in range(len(shards)):
        yield Loss(stage=None, why=said)
        return
    accused = shards[shard.blames]
    if accused is not None and shard.blamed_birth in {0, accused.birth}:
        yield Loss(stage=shard.blames, why=said)


def _suffers(shard: ShardReport, follower: ShardReport | None) -> bool:
    """Whether a shard sees its way on not work; one that dials where nobody listens yet only waits."""
    if follower is None:
        return False
    if shard.state is ShardState.WIRED:
        return leads_to(shard, follower)
    return shard.state is ShardState.READY and follower.locators == shard.wired_to
