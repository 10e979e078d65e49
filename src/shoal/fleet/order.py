"""Orders from the coordinator to a node.

Each carries the fencing epoch of the lease under which it was given: a node refuses what is older than the newest it has seen
(ADR 5).  Orders say what should be true, not what to do, so repeating one changes nothing.
"""

import msgspec

from shoal.fleet.report import ShardId
from shoal.ids import Digest, NodeId
from shoal.runtime.settings import Recovery
from shoal.runtime.speculate.speculator import Speculation
from shoal.transport.codec import Codec


class Hold(msgspec.Struct, frozen=True, kw_only=True, tag="hold"):
    """Have this shard loaded: fetch its chunks from *sources*, load it, report its locators.

    The memory of earlier plans of the deployment is free for it, except of those that are named in `beside`: they still answer.

    One without blocks (`start` equals `stop`) is a relay: nothing is fetched or loaded for it.
    """

    fencing_epoch: int
    shard: ShardId
    stages: int
    manifest: Digest
    start: int
    stop: int
    slots: int
    context_tokens: int
    in_flight: int
    memory_bytes: int
    sources: tuple[NodeId, ...]
    load: bool = True
    """False: have its chunks, and wait to be told again."""
    beside: tuple[int, ...] = ()
    """Plan epochs of the same deployment that stay meanwhile."""
    attempt: int = 0
    """A plan whose stage was lost goes on with another worker for it.  Attempts are counted through the whole plan: the worker of
    a higher one takes the place of that of a lower one on the same node, however that fares."""
    recovery: Recovery = Recovery.EXACT
    """How a worker that is new in a plan that serves is brought to where the one before it was."""
    speculation: Speculation = Speculation()
    draft: Digest = Digest("")
    """Of a model that guesses beside this stage; empty: none."""
    activations: Codec = Codec.RAW
    cache_tokens: int = 0
    """Positions that all slots together may commit; 0: a whole context each."""

    @property
    def is_relay(self) -> bool:
        """Whether it passes frames on and holds no block."""
        return self.start == self.stop


class Wire(msgspec.Struct, frozen=True, kw_only=True, tag="wire"):
    """Send this shard's frames to the next stage (from the last one: token ids to the first)."""

    fencing_epoch: int
    shard: ShardId
    next_node: NodeId
    next_locators: tuple[str, ...]
    next_birth: int = 0
    """Of the worker there (`ShardReport.birth`): another one may listen at the same address."""


class Retire(msgspec.Struct, frozen=True, kw_only=True, tag="retire"):
    """Unload this shard and give its memory back."""

    fencing_epoch: int
    shard: ShardId
    attempt: int | None = None
    """Up to this one; None: whichever it is."""


Order = Hold | Wire | Retire


class Accepted(msgspec.Struct, frozen=True, kw_only=True, tag="accepted"):
    """The order is noted; reports will show its progress."""


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """The order is not followed: *code* and *text* say why; `fencing_epoch` is the newest this node knows."""

    code: str
    text: str
    fencing_epoch: int


Reply = Accepted | Refused
