"""The question of where to cut a graph, and its answer, as values with a documented schema.

Problem: a chain of blocks can be cut only where few tensors cross, at the frontiers of one order of the operators; a
network with branches may be cut more cheaply straight through a block.  Rule: devices stand in a line of *tiers*, the
source first; each operator gets a tier, and what reads a tensor never stands before what makes it.  So every tier runs
all of its operators, sends one frame to the next, and is done: no ping-pong, and the time of one request is a plain sum,

    seconds of all operators where they run
    + for each tier up to the last in use: its overhead and the latency of the link to it
    + for each link: bytes of the tensors that cross it, each once, whatever the number of its readers
    + the way back of the answers.

Rejected: links between any two tiers (no exact cut is known then), and branches that run at the same time on two
tiers (a scheduling problem, not a cut).

All times are seconds, all sizes bytes.  A problem is complete: a solver reads nothing else.
"""

import msgspec

from shoal.ids import NodeId
from shoal.plan.problem import Infeasible, Reason

GRAPH_VERSION = 1


class OpSpec(msgspec.Struct, frozen=True, kw_only=True):
    """An operator, or several that stay together."""

    name: str
    weights_bytes: int = 0
    workspace_bytes: int = 0
    """Activations of one step; a tier needs the largest of its operators'."""


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator makes, or an input of the model, and who reads it."""

    name: str
    size_bytes: int
    producer: int | None = None
    """Index of the operator that makes it; null: an input, which is on the source."""
    consumers: tuple[int, ...] = ()
    """Indices of the operators that read it."""
    returned: bool = False
    """An answer: it goes back to the source."""


class SharedWeights(msgspec.Struct, frozen=True, kw_only=True):
    """Weights that several operators use; `weights_bytes` of each of them counts these, a tier holds them once."""

    size_bytes: int
    ops: tuple[int, ...]


class TierSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A device at its place in the line, and the time of each operator on it (same order as the problem's)."""

    node: NodeId
    op_s: tuple[float, ...]
    memory_budget_bytes: int
    memory_promised_bytes: int = 0
    """Held by other deployments."""
    fixed_bytes: int = 0
    """What a worker process costs before its first weight; the source always has one."""
    weights_factor: float = 1.0
    """Resident bytes per byte of weights once the engine has packed them."""
    step_overhead_s: float = 0.0
    """Cost of one step apart from its operators, also where frames only pass through."""


class TierLink(msgspec.Struct, frozen=True, kw_only=True):
    """One direction between two neighbouring tiers; without one onward the tiers beyond cannot be used."""

    source: NodeId
    target: NodeId
    latency_s: float
    bytes_per_s: float


class OpPin(msgspec.Struct, frozen=True, kw_only=True):
    """Operator *op* runs on *node*."""

    op: int
    node: NodeId


class GraphProblem(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="graph"):
    """Spread these operators over these tiers so that one request takes the least time."""

    version: int = GRAPH_VERSION
    ops: tuple[OpSpec, ...]
    """In any order; together with `tensors` they must make no circle."""
    tensors: tuple[TensorSpec, ...]
    tiers: tuple[TierSpec, ...]
    """The source first; each sends to the next one only."""
    links: tuple[TierLink, ...] = ()
    pin_inputs: bool = True
    """Operators that read an input of the model stay on the source, so that raw data does not leave it."""
    pins: tuple[OpPin, ...] = ()
    shared: tuple[SharedWeights, ...] = ()


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What one tier does for a request; without operators it passes frames on."""

    node: NodeId
    ops: tuple[int, ...]
    """Indices, in an order in which they can run."""
    names: tuple[str, ...]
    weights_bytes: int
    """Each tensor once."""
    memory_bytes: int
    """Fixed cost, packed weights and the largest workspace; 0 where it runs nothing."""
    compute_s: float
    """Overhead included."""
    sends: tuple[str, ...] = ()
    """Names of the tensors that go on to the next tier."""
    send_bytes: int = 0
    send_s: float = 0.0
    """Latency included; 0 for the last tier in use."""
    return_bytes: int = 0
    """Of answers, on the link back to the tier before."""
    return_s: float = 0.0


class WholeAlternative(msgspec.Struct, frozen=True, kw_only=True):
    """The whole model on one tier: always weighed (ADR 10)."""

    node: NodeId
    latency_s: float | None = None
    """What it would take, also where it is refused; null when no link leads there and back."""
    refused: str = ""
    """Why it is not possible; empty when it is."""


class GraphPlan(msgspec.Struct, frozen=True, kw_only=True, tag="graph-plan"):
    """Operators on tiers, with the certificate."""

    parts: tuple[Part, ...]
    """In the order of the tiers, up to the last one in use."""
    latency_s: float
    """Of one request."""
    lower_bound: float
    """No cut takes less, in seconds."""
    gap: float
    """(latency - lower bound) / latency; 0 means proven optimal."""
    solver: str
    """`chain`: cut between blocks only; `min-cut`: cut anywhere; `min-cut-branch-and-bound`: the same, memory being short."""
    chain_latency_s: float | None = None
    """The best plan found that cuts between blocks only; null when there is none."""
    reasons: tuple[Reason, ...] = ()
    alternatives: tuple[WholeAlternative, ...] = ()


GraphAnswer = GraphPlan | Infeasible
