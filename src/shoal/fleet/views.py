"""What people and programs see of a fleet: the values of the admin API and of the SDK.

They are views: made for reading, never fed back into a decision.  A struct that a caller sends is strict about fields
that it does not know; a struct that a caller receives tolerates them, so that an older SDK reads a newer gateway.
"""

from enum import StrEnum
from typing import Annotated

import msgspec

from shoal.fleet.spec import KEEP_ALIVE_S
from shoal.fleet.state import Standing
from shoal.ids import DeploymentId, NodeId
from shoal.plan.problem import Choose, Cloud, Limits, Objective, Pin, Plan, Relays, RequestShape, Residency
from shoal.runtime.settings import Recovery
from shoal.runtime.speculate.speculator import ADAPTIVE, Speculation
from shoal.transport.codec import Codec


class LinkView(msgspec.Struct, frozen=True, kw_only=True):
    """One direction of a measured link, seen from its source."""

    target: NodeId
    rtt_p50_s: float
    rtt_p99_s: float
    bytes_per_s: float
    relayed: bool = False
    jitter_s: float = 0.0
    """Half of the small round trips are within this of the median one."""


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """One machine.  `load` is runnable work per core, averaged over a minute; None where the system does not tell."""

    id: NodeId
    name: str
    standing: Standing
    roles: tuple[str, ...] = ()
    address: str = ""
    cores: int = 0
    memory_total_bytes: int = 0
    memory_budget_bytes: int = 0
    memory_promised_bytes: int = 0
    providers: tuple[str, ...] = ()
    load: float | None = None
    links: tuple[LinkView, ...] = ()


class DeploymentState(StrEnum):
    """Where a deployment is between being wanted and being gone."""

    PLANNED = "planned"
    LOADING = "loading"
    READY = "ready"
    DEGRADED = "degraded"
    FAILED = "failed"
    ASLEEP = "asleep"
    """Loaded on demand: the next request has it loaded."""


class PredictionView(msgspec.Struct, frozen=True, kw_only=True):
    """How far a plan's predictions are from what its newest requests took: medians of |predicted - measured| / measured.

    Of requests that were alone in the pipeline, as this gateway hears it; None where none could be compared.
    """

    requests: int
    time_to_first_token_error: float | None = None
    time_per_output_token_error: float | None = None


class DeploymentView(msgspec.Struct, frozen=True, kw_only=True):
    """One served model.  `detail` says in words what it waits for, or why it failed."""

    name: DeploymentId
    model: str
    state: DeploymentState
    kind: str = ""
    """What one may ask of it, in the words of `ModelKind`; empty where this gateway does not have the model."""
    detail: str = ""
    plan: Plan | None = None
    plan_epoch: int = 0
    moved: str = ""
    """Why this plan took the place of another that served; empty where it did not."""
    mends: int = 0
    """How often a lost stage of this plan was given to another worker, while the others stayed as they were."""
    on_demand: bool = False
    """Loaded when somebody asks, and unloaded when it is idle."""
    busy: tuple[float | None, ...] = ()
    """Of each stage, the share of the last seconds that its engine has worked: the greatest is the bottleneck."""
    last_token_age_s: float | None = None
    """Since a token went through every stage; None before the first."""
    prediction: PredictionView | None = None
    """None before a request was compared with the plan, and at other gateways than its own."""


class EventView(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened.  `sequence` grows from event to event of this fleet; `unix_s` is for people only (ADR 4)."""

    sequence: int
    kind: str
    node: NodeId | None = None
    deployment: DeploymentId | None = None
    unix_s: float = 0.0
    text: str = ""
    data: dict[str, str | int | float | bool | None] = {}


class ComponentHealth(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the gateway's surroundings; `reason` when it is not well."""

    name: str
    ready: bool
    reason: str = ""


class DeploymentHealth(msgspec.Struct, frozen=True, kw_only=True):
    """Age of the last token that went through every stage; None before the first."""

    name: DeploymentId
    ready: bool
    last_token_age_s: float | None = None
    asleep: bool = False
    """It is loaded on demand, and nobody asks: no token is asked for, and `ready` says that a request would have it loaded."""


class HealthView(msgspec.Struct, frozen=True, kw_only=True):
    """Readiness of a gateway, part by part, and of the deployments that it answers for."""

    components: tuple[ComponentHealth, ...] = ()
    deployments: tuple[DeploymentHealth, ...] = ()

    @property
    def ready(self) -> bool:
        """Whether requests would be answered.

        A deployment that answers is proof, whatever else ails: it goes on by its last plan when no coordinator is heard, and one
        that still loads does not hold it up.  Where none is declared, every component must be well.
        """
        return any(d.ready for d in self.deployments) if self.deployments else all(c.ready for c in self.components)


class JoinView(msgspec.Struct, frozen=True, kw_only=True):
    """How another machine joins this fleet: the address to dial and the command to type there."""

    address: str
    command: str
    token: str = ""


class PlanRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where would this model go?  Nothing is loaded."""

    model: str
    objective: Objective = Objective.LATENCY
    shape: RequestShape = RequestShape()
    stages: int = 0
    """0: the planner decides; else exactly this many."""
    pins: tuple[Pin, ...] = ()
    exclude: tuple[NodeId, ...] = ()
    limits: Limits = Limits()
    residency: Residency = Residency()
    choose: Choose = Choose()
    """What of the shape a plan for throughput may choose."""
    cloud: Cloud | None = None
    """An endpoint to weigh beside the plan."""
    relays: Relays = Relays.IF_NEEDED
    """Whether frames may pass through a node that holds no block."""
    activations: Codec = Codec.RAW
    """How float32 tensors are written between stages: bit for bit, or smaller with a loss."""
    draft: str = ""
    """A small model of the gateway's node, with the same tokenizer, that guesses beside the first stage; empty: none."""
    activations_per_cut: bool = False
    """The plan chooses for each cut: exactly where the link allows it, and never with more loss than `activations` has."""


class DeployRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Serve this model under `name` (empty: the model's own)."""

    plan: PlanRequest
    name: str = ""
    speculation: Speculation = ADAPTIVE
    recovery: Recovery = Recovery.EXACT
    """How the rows of an answer with a seed are computed again when it goes on after a loss."""
    """Whether later tokens are guessed and checked in one lap, and how many at most."""
    on_demand: bool = False
    """Loaded when somebody asks, and unloaded when nobody has for `keep_alive_s`, or when its memory is needed."""
    keep_alive_s: Annotated[float, msgspec.Meta(ge=0)] | None = KEEP_ALIVE_S
    """Of one that is loaded on demand; null: until its memory is needed."""


class ProfileRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Measure devices (all when `nodes` is empty) on the blocks of *model*; `refresh` ignores what is cached."""

    model: str = ""
    nodes: tuple[NodeId, ...] = ()
    refresh: bool = False
