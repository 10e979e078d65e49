"""The planner's question and answers, as values with a documented schema.

All times are seconds, all sizes bytes, block ranges half-open.  A problem is complete: a solver reads nothing else.
How these values become seconds and bytes of a plan is stated once, in `shoal.plan.cost`.
"""

from enum import StrEnum
from typing import Annotated

import msgspec

from shoal.ids import NodeId
from shoal.transport.codec import Codec

PROBLEM_VERSION = 2


class Objective(StrEnum):
    """What a plan is judged by."""

    LATENCY = "latency"
    """Seconds of a request."""
    THROUGHPUT = "throughput"
    """Tokens per second of all streams together."""
    ENERGY = "energy"
    """Joules of a request."""
    PRICE = "price"
    """Money of a request."""


class OutputBytes(msgspec.Struct, frozen=True, kw_only=True):
    """What leaves a block when it is written smaller, with a loss."""

    codec: Codec
    bytes_per_token: int
    bytes_fixed: int = 0


class BlockSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a block needs and sends, whoever runs it."""

    name: str
    weights_bytes: int
    kv_bytes_per_token: int = 0
    output_bytes_per_token: int = 0
    """Boundary bytes that leave the block for each row of a step."""
    output_bytes_fixed: int = 0
    smaller: tuple[OutputBytes, ...] = ()
    """The same output in the ways that may be chosen for a cut behind the block, the one that loses least first."""
    load_peak_bytes: int = 0
    """Memory beyond the packed weights that loading needs for a moment; a shard needs the largest of its blocks'."""
    workspace_bytes: int = 0
    """Activations of one step; a shard needs the largest of its blocks'."""


class SharedTensor(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor that several blocks use (a tied embedding); the weights of each of them count it, a shard holds it once."""

    size_bytes: int
    blocks: tuple[int, ...]


class BatchTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Times of one step with a new token for each of `batch` sequences."""

    batch: int
    decode_s: tuple[float, ...]
    """Of each block, at the shape's mean context."""


class DeviceSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One device: memory, and the time of each block on it (same order as the problem's blocks)."""

    node: NodeId
    memory_budget_bytes: int
    memory_promised_bytes: int = 0
    """Held by other deployments."""
    fixed_bytes: int = 0
    """What a worker process costs before its first weight."""
    weights_factor: float = 1.0
    """Resident bytes per byte of weights once the engine has packed them."""
    step_overhead_s: float = 0.0
    """Cost of one stage step apart from its blocks."""
    decode_s: tuple[float, ...]
    """One new token at the shape's mean context; may be empty for an excluded device."""
    prefill_s: tuple[float, ...]
    """The shape's whole prompt; may be empty for an excluded device."""
    batched: tuple[BatchTimes, ...] = ()
    """Steps of several sequences, beside `decode_s` for one; with none given they cost as if one after another."""
    device_class: str = ""
    """Devices of one class are alike in everything but their links; empty: unlike every other."""
    active_watts: float = 0.0
    """Power above idle while a block runs; what a device draws when idle is drawn whether it takes part or not."""
    joules_limit: float | None = None
    """What one request may draw here for its blocks at most (a battery), all shards together; None: no limit."""
    price_per_hour: float = 0.0
    """Of busy time, in any one currency."""
    region: str = ""
    trust: str = ""
    """Names that `Residency` goes by; empty: unknown."""


class LinkSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One direction; absent pairs cannot talk."""

    source: NodeId
    target: NodeId
    latency_s: float
    bytes_per_s: float
    relayed: bool = False
    medium: str = ""
    """Links that name the same medium (a Wi-Fi channel) take turns on it; empty: a wire of its own."""
    joules_per_byte: float = 0.0
    price_per_byte: float = 0.0


class RequestShape(msgspec.Struct, frozen=True, kw_only=True):
    """What a typical request asks; phases are weighted by it, not averaged."""

    tokens_in: int = 128
    tokens_out: int = 128
    context_tokens: int = 2048
    slots: int = 2
    """Sequences whose cache is held at once."""
    cache_tokens: int = 0
    """Positions whose cache all slots hold together; 0: a whole context for each.  Requests wait until theirs fit."""
    in_flight: int = 1
    """Micro-batches in the pipeline at once."""
    batch: int = 1
    """Sequences of a micro-batch, stepped together; each needs a slot."""
    prefill_chunk_tokens: int = 128
    """Prompts run in steps of at most this many rows."""
    retain_outputs: bool = False
    """Stages keep what they sent for live sequences, so that a successor can be rebuilt: memory like a cache."""


class Choose(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan for throughput may choose of the shape.  Everything else takes the shape as it stands.

    More micro-batches hide the lap, larger ones share a step, and the cache of each sequence takes memory from the blocks.
    """

    batch: tuple[int, ...] = ()
    """Sizes of a micro-batch to choose from; empty: the shape's."""
    in_flight: int = 0
    """At most so many micro-batches in the pipeline; 0: the shape's number."""
    slots: int = 0
    """At most so many slots, and as many as the choice needs (batch x in flight); 0: the shape's number, whatever is chosen."""


class Cloud(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint that answers instead of the fleet, priced beside a plan.  What it gives is declared, not measured."""

    name: str
    time_to_first_token_s: float
    """From the last byte of the question there to the first token here, for a typical prompt."""
    time_per_output_token_s: float
    round_trip_s: float = 0.0
    """To the endpoint and back, once a request."""
    price_per_request: float = 0.0
    price_per_1k_tokens_in: float = 0.0
    price_per_1k_tokens_out: float = 0.0
    """In the currency of the devices' prices."""
    streams: int = 0
    """Requests that it answers at once for us; 0: as many as the shape has in flight."""
    region: str = ""
    trust: str = ""
    """Names that `Residency` goes by; empty: unknown."""


class Residency(msgspec.Struct, frozen=True, kw_only=True):
    """Where activations may be: a hard rule, for blocks and relays alike.  An empty list allows everything.

    A device that does not say where it is, or how far it is trusted, is not allowed by a list.
    """

    regions: tuple[str, ...] = ()
    trusts: tuple[str, ...] = ()


class Relays(StrEnum):
    """What a user says of relays."""

    NEVER = "never"
    IF_NEEDED = "if-needed"
    """Only where there is no plan without."""
    ALWAYS = "always"
    """Wherever the way round is better."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan must keep to whatever it is judged by; None: no limit.  All are of predicted figures (`Estimate`)."""

    latency_s: float | None = None
    """Of one request, at most."""
    time_to_first_token_s: float | None = None
    """At most."""
    tokens_per_s: float | None = None
    """Of all streams together, at least."""
    joules: float | None = None
    """Of one request, at most."""
    price: float | None = None
    """Of one request, at most."""


class Pin(msgspec.Struct, frozen=True, kw_only=True):
    """Block *block* runs on *node*."""

    block: int
    node: NodeId


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Place these blocks on these devices, as a chain of stages; a device takes one stage.

    One exception: when the first and the last block both belong to the source, it may run the first and the last stage.
    """

    version: int = PROBLEM_VERSION
    blocks: tuple[BlockSpec, ...]
    devices: tuple[DeviceSpec, ...]
    links: tuple[LinkSpec, ...]
    shape: RequestShape = RequestShape()
    objective: Objective = Objective.LATENCY
    source: NodeId
    """Where prompts enter; by default block 0 stays there."""
    pin_first: bool = True
    pin_last: bool = False
    """The last block runs on the source, so that answers are seen there alone."""
    pins: tuple[Pin, ...] = ()
    max_stages: int = 0
    """0: as many as there are devices."""
    stages_exactly: int = 0
    """0: free; else the plan must have this many stages (`--stages`)."""
    exclude: tuple[NodeId, ...] = ()
    """Nodes that take no block."""
    require: tuple[NodeId, ...] = ()
    """Nodes that must take at least one."""
    residency: Residency = Residency()
    limits: Limits = Limits()
    relay: bool = False
    """Between two stages frames may pass through one node that holds no block."""
    relay_if_needed: bool = False
    """The same, but only where there is no plan without: shards need not leave room for relays that are never needed."""
    shared: tuple[SharedTensor, ...] = ()
    choose: Choose = Choose()
    cloud: Cloud | None = None
    """Weighed beside the plan."""


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """A shard on a device, with the memory it needs and its predicted times.

    A stage without blocks (`start` equals `stop`) is a relay: it passes frames on.
    """

    node: NodeId
    start: int
    stop: int
    weights_bytes: int
    kv_bytes: int
    memory_bytes: int
    """The most it holds at any moment: fixed cost, packed weights, and cache with workspace or the load peak.

    Stages of one device add up: its relays share one process, for which its shards leave room.
    """
    prefill_s: float
    """The whole prompt, step overheads included."""
    decode_s: float
    """One step of a micro-batch, step overhead included."""
    send_prefill_s: float
    """Until the next stage has the whole prompt's frames; from the last stage, until the source has the first token."""
    send_decode_s: float
    """Until the next stage has a step's frame; from the last stage, until the first one has the token."""
    first_block: str = ""
    last_block: str = ""
    """Names of the blocks `start` and `stop` - 1."""
    writes: Codec = Codec.RAW
    """How it writes what it sends, where that was chosen for each cut (`Plan.written`); else the deployment says it."""

    @property
    def is_relay(self) -> bool:
        """Whether it holds no block and passes frames on."""
        return self.start == self.stop


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """Predicted figures per phase."""

    time_to_first_token_s: float
    time_per_output_token_s: float
    tokens_per_s: float
    """Answer tokens per second of all streams together, prompts worked off included (closed loop)."""
    latency_s: float
    """Time to first token + (tokens out - 1) x time per output token."""
    joules: float = 0.0
    """Of one request: devices above idle, and links."""
    price: float = 0.0
    """Of one request."""


class Infeasible(msgspec.Struct, frozen=True, kw_only=True, tag="infeasible"):
    """No placement satisfies the constraints: what is missing, and the nearest change that would help."""

    reason: str
    needed_bytes: int
    """Of the placement that comes closest; 0 when memory is not what stands in the way."""
    available_bytes: int
    """What its devices have of that."""
    hint: str = ""

    @property
    def missing_bytes(self) -> int:
        """How much memory more would be needed at least."""
        return max(0, self.needed_bytes - self.available_bytes)


class Reason(msgspec.Struct, frozen=True, kw_only=True):
    """Why a device takes part or not."""

    node: NodeId
    used: bool
    text: str


class Alternative(msgspec.Struct, frozen=True, kw_only=True):
    """The whole model on one device: always weighed (ADR 10)."""

    node: NodeId
    estimate: Estimate | None = None
    """What it would give, also where it is refused; None when no link joins it with the source."""
    refused: str = ""
    """Why it is not possible; empty when it is."""


class CloudAlternative(msgspec.Struct, frozen=True, kw_only=True):
    """The same requests at the problem's cloud endpoint."""

    name: str
    estimate: Estimate
    """What it would give, also where it is refused; joules are those of its own machines and count as none."""
    refused: str = ""
    """Why it is not allowed; empty when it is."""


class Weighed(msgspec.Struct, frozen=True, kw_only=True):
    """A size of micro-batches, and the best plan found with it."""

    batch: int
    in_flight: int
    slots: int
    tokens_per_s: float


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """How the output of a stage is written, and why."""

    stage: int
    """From 0."""
    codec: Codec
    saved_s: float
    """Of a request, over exact activations, with all other cuts exact."""
    text: str


class Plan(msgspec.Struct, frozen=True, kw_only=True, tag="plan"):
    """A placement with its certificate."""

    stages: Annotated[tuple[Stage, ...], msgspec.Meta(min_length=1)]
    objective: Objective
    shape: RequestShape
    """The problem's, with what was chosen of it."""
    estimate: Estimate
    lower_bound: float
    """Of the objective's value: seconds of latency, seconds per token for throughput, joules or money per request."""
    gap: float
    """(value - lower bound) / value; 0 means proven optimal."""
    solver: str
    reasons: tuple[Reason, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    cloud: CloudAlternative | None = None
    weighed: tuple[Weighed, ...] = ()
    """Sizes of micro-batches that were searched, where the problem leaves them open; bounds ruled out the others."""
    written: tuple[Written, ...] = ()
    """For each cut how activations are written, where that was left to the plan.  The lower bound and the gap are then those of
    the same plan with exact activations: how they are written is chosen last."""


Answer = Plan | Infeasible
