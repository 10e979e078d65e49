"""The planner's question and answers, as values with a documented schema.

All times are seconds, all sizes bytes, block ranges half-open.  A problem is complete: a solver reads nothing else.
"""

from enum import StrEnum

import msgspec

from shoal.ids import NodeId


class Objective(StrEnum):
    """What a plan is judged by."""

    LATENCY = "latency"
    THROUGHPUT = "throughput"


class BlockSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a block needs and sends, whoever runs it."""

    name: str
    weights_bytes: int
    kv_bytes_per_token: int = 0
    output_bytes_per_token: int = 0
    """Boundary bytes that leave the block for each row of a step."""
    output_bytes_fixed: int = 0
    load_peak_bytes: int = 0
    """Memory beyond weights and cache that loading needs for a moment."""
    workspace_bytes: int = 0


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
    decode_s: tuple[float, ...]
    """One new token at the shape's mean context."""
    prefill_s: tuple[float, ...]
    """The shape's whole prompt."""


class LinkSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One direction; absent pairs cannot talk."""

    source: NodeId
    target: NodeId
    latency_s: float
    bytes_per_s: float
    relayed: bool = False


class RequestShape(msgspec.Struct, frozen=True, kw_only=True):
    """What a typical request asks; phases are weighted by it, not averaged."""

    tokens_in: int = 128
    tokens_out: int = 128
    context_tokens: int = 2048
    slots: int = 2
    """Sequences whose cache is held at once."""
    in_flight: int = 1
    """Micro-batches in the pipeline at once."""


class Pin(msgspec.Struct, frozen=True, kw_only=True):
    """Block *block* runs on *node*."""

    block: int
    node: NodeId


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Place these blocks on these devices."""

    blocks: tuple[BlockSpec, ...]
    devices: tuple[DeviceSpec, ...]
    links: tuple[LinkSpec, ...]
    shape: RequestShape = RequestShape()
    objective: Objective = Objective.LATENCY
    source: NodeId
    """Where prompts enter; by default block 0 stays there."""
    pin_first: bool = True
    pin_last: bool = False
    pins: tuple[Pin, ...] = ()
    max_stages: int = 0
    """0: as many as there are devices."""
    stages_exactly: int = 0
    """0: free; else the plan must have this many stages (`--stages`)."""
    exclude: tuple[NodeId, ...] = ()


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """A shard on a device, with the memory it needs and its predicted times."""

    node: NodeId
    start: int
    stop: int
    weights_bytes: int
    kv_bytes: int
    memory_bytes: int
    """Weights as packed, cache of all slots, workspace, fixed cost."""
    prefill_s: float
    decode_s: float
    send_prefill_s: float
    """Until the next stage (or, from the last one, the first) has the frame."""
    send_decode_s: float


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """Predicted figures per phase."""

    time_to_first_token_s: float
    time_per_output_token_s: float
    tokens_per_s: float
    """All streams together, with the shape's micro-batches in flight."""
    latency_s: float
    """Time to first token + (tokens out - 1) x time per output token."""


class Infeasible(msgspec.Struct, frozen=True, kw_only=True, tag="infeasible"):
    """No placement satisfies the constraints: what is missing, and the nearest change that would help."""

    reason: str
    needed_bytes: int
    available_bytes: int
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
    refused: str = ""
    """Why it is not possible; empty when it is."""


class Plan(msgspec.Struct, frozen=True, kw_only=True, tag="plan"):
    """A placement with its certificate."""

    stages: tuple[Stage, ...]
    objective: Objective
    shape: RequestShape
    estimate: Estimate
    lower_bound: float
    """Of the objective's value: seconds of latency, or seconds per token for throughput."""
    gap: float
    """(value - lower bound) / value; 0 means proven optimal."""
    solver: str
    reasons: tuple[Reason, ...] = ()
    alternatives: tuple[Alternative, ...] = ()


Answer = Plan | Infeasible
