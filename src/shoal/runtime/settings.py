"""What a stage machine must know about itself and its model."""

import msgspec

from shoal.runtime.scheduler import SchedulerSettings


class StageSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Stage `index` of `stages` in the pipeline of one plan epoch.

    `slots` and `context_tokens` size the cache; both are 0 for a model that only infers.  `sends` names the tensors that the next
    stage needs (empty: exactly the shard's outputs); those that the shard does not make are passed on from its input.
    Every `heartbeat_s` each request gets a sign of life (an empty delta), so that gateways can tell slow from gone.
    A frame whose answer has not come after `lost_s` (far longer than any step takes) is lost, and its requests fail.
    `credits` frames at most are on their way to the next stage; one not returned for `overdue_s` makes it suspect.
    """

    plan_epoch: int
    index: int
    stages: int
    slots: int = 0
    context_tokens: int = 0
    vocabulary: int = 0
    eos_token_ids: tuple[int, ...] = ()
    sends: tuple[str, ...] = ()
    credits: int = 4
    overdue_s: float = 10.0
    heartbeat_s: float = 2.0
    lost_s: float = 120.0
    scheduler: SchedulerSettings = SchedulerSettings()

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.stages - 1
