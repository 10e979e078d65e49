"""What a node says about itself, several times a second: the only source of the *actual* state."""

from enum import StrEnum

import msgspec

from shoal.ids import DeploymentId, Digest, NodeId
from shoal.profile.fleet import Declared


class ShardId(msgspec.Struct, frozen=True, kw_only=True):
    """Stage *stage* of one plan of one deployment."""

    deployment: DeploymentId
    plan_epoch: int
    stage: int

    def __str__(self) -> str:
        return f"{self.deployment}/{self.plan_epoch}/{self.stage}"


class ShardState(StrEnum):
    """How far a shard has come.  Each state follows one before it (`fetched` may be passed over); `failed` may follow any."""

    FETCHING = "fetching"
    FETCHED = "fetched"
    """On disk, and told to wait: another plan still has the memory."""
    LOADING = "loading"
    READY = "ready"
    WIRED = "wired"
    FAILED = "failed"


class StepTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Steps of answers that a stage has made since its last report: each one new position for each of `batch` sequences."""

    until: int
    """How many such steps it has made since it was loaded: tells new ones from those of a report that comes again."""
    time_s: float
    """Median of the engine's calls."""
    batch: int = 1
    context: float = 0.0
    """Cached positions of a sequence, on average."""


class HopTimes(msgspec.Struct, frozen=True, kw_only=True):
    """A stage's way to the next one: the quickest of some round trips of a hello beside the frames."""

    until: int
    """How many hellos were answered since it was wired."""
    rtt_s: float
    base_s: float
    """Just after it was wired."""


NOBODY = -1
"""In place of a stage: somebody is to blame, but who?"""


class ShardReport(msgspec.Struct, frozen=True, kw_only=True):
    """A shard that this node holds.  `locators` are where its data session listens (from `ready` on)."""

    shard: ShardId
    state: ShardState
    start: int
    stop: int
    locators: tuple[str, ...] = ()
    attempt: int = 0
    """Of the order that it was started by; see `Hold.attempt`."""
    birth: int = 0
    """Tells its worker from every other that ever held this shard; 0 while there is none."""
    wired_to: tuple[str, ...] = ()
    """Locators that its frames go to, once it is wired; in `ready` with an error, those that it cannot reach."""
    wired_birth: int = 0
    """Of the worker that listens there; 0 when nobody said."""
    next_node: NodeId | None = None
    """The node that listens there."""
    rtt_s: float | None = None
    """There and back, when it was wired."""
    error_code: str = ""
    error: str = ""
    """Why it has failed; in another state, what it sees go wrong around it: that may pass by itself, or another plan is made."""
    blames: int | None = None
    """The stage at which it sees that; None: the next one; `NOBODY` when it cannot tell."""
    blamed_birth: int = 0
    """Of the worker there; 0 when it does not know."""
    doubt: str = ""
    """What may be about to go wrong: something is silent that should have spoken.  Passes by itself, or becomes an error."""
    memory_bytes: int = 0
    """Planned bytes, promised from the moment the order was taken."""
    fetched_bytes: int = 0
    steps: int = 0
    busy_s: float = 0.0
    """Seconds that the engine has worked since it was loaded."""
    busy_share: float | None = None
    """Of the last seconds, 0 to 1: how much of them the engine has worked; None before there was one to look back on."""
    live_requests: int = 0
    """Requests that are being answered (first stages only)."""
    waiting_requests: int = 0
    """Requests that wait for a slot (first stages only)."""
    step_times: StepTimes | None = None
    """Of the newest steps; None until some were made."""
    hop_times: HopTimes | None = None


class Use(msgspec.Struct, frozen=True, kw_only=True):
    """How much the gateway of this node is asked for a model that is loaded on demand; probes of health do not count."""

    deployment: DeploymentId
    in_flight: int = 0
    """Requests that are answered, or wait for that."""
    idle_s: float | None = None
    """Since the last of them ended, or 0 while there are any; None: nobody has asked since this node was started."""


class NodeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What does not change while a node runs."""

    name: str
    version: str
    locators: tuple[str, ...]
    """Where the agent listens for other agents."""
    zid: str = ""
    """Of the agent's session: several machines may have the same address (loopback, a container bridge), none the same id."""
    cores: int
    memory_total_bytes: int
    memory_budget_bytes: int
    providers: tuple[str, ...] = ()
    fingerprint: str = ""
    gateway: str = ""
    """Address of the node's HTTP gateway; empty when it has none."""
    coordinates: bool = False
    """May hold the coordinator's lease."""
    slowdown: float = 1.0
    """Factor by which an emulated device is slower than this machine; 1 on real ones."""
    declared: Declared = Declared()
    codecs: tuple[str, ...] = ()
    """Ways of writing activations that this node reads beside those that every release does."""
    mends: bool = False
    """Can start a shard of a plan that serves anew (`Hold.attempt`)."""


class NodeReport(msgspec.Struct, frozen=True, kw_only=True):
    """A heartbeat.  A higher `incarnation` is a restarted node; within one, a higher `sequence` is newer."""

    node: NodeId
    incarnation: int
    sequence: int
    facts: NodeFacts
    load_1m: float = 0.0
    memory_free_bytes: int = 0
    shards: tuple[ShardReport, ...] = ()
    manifests: tuple[Digest, ...] = ()
    """Models of which this node has every chunk."""
    leaving: bool = False
    uses: tuple[Use, ...] = ()

    def newer_than(self, other: "NodeReport") -> bool:
        """Whether this report replaces *other* of the same node."""
        return (self.incarnation, self.sequence) > (other.incarnation, other.sequence)
