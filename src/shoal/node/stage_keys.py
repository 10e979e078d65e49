"""Where the stages of a pipeline send and listen."""

from dataclasses import dataclass

from shoal.fleet.report import ShardId
from shoal.ids import NodeId
from shoal.transport.keys import CreditTopic, FrameTopic, TokensTopic, WorkerTopic, key_of


@dataclass(frozen=True, slots=True)
class StageKeys:
    """Where a stage sends and listens: built once, for escaping names at every frame costs as much as sending it."""

    frames_in: str
    frames_out: str
    tokens: str
    credits_in: str
    credits_out: str
    forward: str
    """To the next stage: from the last one, that is the first."""


def stage_keys(fleet: str, shard: ShardId, stages: int) -> StageKeys:
    """The keys of *shard* in a pipeline of *stages*."""
    name, epoch, index = shard.deployment, shard.plan_epoch, shard.stage
    before = (index - 1) % stages
    tokens = key_of(TokensTopic(fleet=fleet, deployment=name, plan_epoch=epoch))
    onward = key_of(FrameTopic(fleet=fleet, deployment=name, plan_epoch=epoch, stage=index + 1))
    return StageKeys(
        frames_in=key_of(FrameTopic(fleet=fleet, deployment=name, plan_epoch=epoch, stage=index)),
        frames_out=onward,
        tokens=tokens,
        credits_in=key_of(CreditTopic(fleet=fleet, deployment=name, plan_epoch=epoch, stage=index)),
        credits_out=key_of(CreditTopic(fleet=fleet, deployment=name, plan_epoch=epoch, stage=before)),
        forward=tokens if index == stages - 1 else onward,
    )


def submit_topic(fleet: str, node: NodeId, shard: ShardId) -> WorkerTopic:
    """Where gateways send requests for the pipeline whose first stage is *shard* on *node*."""
    return WorkerTopic(
        fleet=fleet,
        node=node,
        deployment=shard.deployment,
        plan_epoch=shard.plan_epoch,
        stage=shard.stage,
        verb="submit",
    )
