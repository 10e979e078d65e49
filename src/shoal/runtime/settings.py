"""What a stage machine must know about itself and its model."""

from enum import StrEnum

import msgspec

from shoal.runtime.scheduler import SchedulerSettings
from shoal.runtime.speculate.speculator import Speculation
from shoal.transport.codec import Codec


class Recovery(StrEnum):
    """How the rows of an answer with a seed are computed again, when it goes on after a loss."""

    EXACT = "exact"
    """By the same steps again: equal engines give equal bits."""
    FAST = "fast"
    """By as few steps as possible: the last bits may differ, and with them, in near ties, a token."""


class TensorForm(msgspec.Struct, frozen=True, kw_only=True):
    """What a shard takes under a name; None in `shape` is any size."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


CREDITS = 4


def credits_for(in_flight: int) -> int:
    """Frames that may be on their way to the next stage where *in_flight* of them may be in the pipeline.

    On a long link the answer to the first comes when the last has been sent: with fewer, each lap would take several round
    trips.  Closings, which hold no rows, come on top.
    """
    return max(CREDITS, in_flight + 2)


class StageSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Stage `index` of `stages` in the pipeline of one plan epoch.

    `slots` and `context_tokens` size the cache; both are 0 for a model that only infers.  All slots together commit at most
    `cache_tokens` positions of it (0: a whole context each).  `sends` names the tensors that the next
    stage needs (empty: exactly the shard's outputs); those that the shard does not make are passed on from its input.
    `run` tells this start of a first stage from others, for the stages that outlive it.
    `takes` says what must come with a frame (empty: whatever comes).
    Every `heartbeat_s` each request gets a sign of life (an empty delta), so that gateways can tell slow from gone.
    `birth` tells this worker from every other that holds, or held, the same stage.
    `credits` frames at most are on their way to the next stage.  A frame that has been out for `remind_s` is followed by a
    word on what was sent, and one without an answer for `probe_s` by a probe: both find out what was lost, and neither takes a
    slow stage for a broken one.  A next stage that owes something and shows no sign of life for `overdue_s` is in trouble.
    Where every stage lives and yet nothing comes out for `lost_s` (longer than any step may take), an engine hangs.
    """

    plan_epoch: int
    index: int
    stages: int
    slots: int = 0
    context_tokens: int = 0
    cache_tokens: int = 0
    vocabulary: int = 0
    eos_token_ids: tuple[int, ...] = ()
    run: int = 0
    birth: int = 0
    recovery: Recovery = Recovery.EXACT
    sends: tuple[str, ...] = ()
    takes: tuple[TensorForm, ...] = ()
    credits: int = CREDITS
    remind_s: float = 2.0
    probe_s: float = 5.0
    overdue_s: float = 10.0
    heartbeat_s: float = 2.0
    lost_s: float = 120.0
    scheduler: SchedulerSettings = SchedulerSettings()
    speculation: Speculation = Speculation()
    draft_tokens: int = 0
    """Positions that the draft model beside a first stage has in each of `slots`; 0: there is none."""
    activations: Codec = Codec.RAW
    """How what goes to the next stage is written."""

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.stages - 1
