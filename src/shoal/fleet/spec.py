"""Declared work: what an operator wants to be true."""

from enum import StrEnum

import msgspec

from shoal.ids import DeploymentId, Digest, NodeId
from shoal.plan.problem import Choose, Cloud, Limits, Objective, Pin, Relays, RequestShape, Residency
from shoal.runtime.settings import Recovery
from shoal.runtime.speculate.speculator import Speculation
from shoal.transport.codec import Codec

KEEP_ALIVE_S = 300.0
"""Where nobody says how long a model that is loaded on demand stays when it is idle."""


class Standbys(StrEnum):
    """What is kept ready for the loss of a node."""

    NONE = "none"
    TENSORS = "tensors"
    """The node that would take a stage over has its tensors on disk."""
    LOADED = "loaded"
    """It has them loaded, in a worker that waits: memory for two."""


class DeploymentSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Serve this model.  Per deployment the highest `generation` wins, whoever wrote it."""

    deployment: DeploymentId
    model: str
    manifest: Digest
    source: NodeId
    """The node whose gateway takes the prompts and that keeps block 0."""
    shape: RequestShape = RequestShape()
    objective: Objective = Objective.LATENCY
    stages_exactly: int = 0
    pins: tuple[Pin, ...] = ()
    exclude: tuple[NodeId, ...] = ()
    limits: Limits = Limits()
    residency: Residency = Residency()
    choose: Choose = Choose()
    cloud: Cloud | None = None
    relays: Relays = Relays.IF_NEEDED
    activations: Codec = Codec.RAW
    activations_per_cut: bool = False
    """The plan says for each cut, and loses no more than `activations` does."""
    recovery: Recovery = Recovery.EXACT
    standbys: Standbys = Standbys.TENSORS
    speculation: Speculation = Speculation()
    draft: Digest = Digest("")
    """Of a model that guesses beside the first stage; empty: none."""
    on_demand: bool = False
    """Loaded when somebody asks, and unloaded when nobody has for a while, or when the memory is needed (`fleet.demand`)."""
    keep_alive_s: float | None = KEEP_ALIVE_S
    """How long it stays after its last answer; None: until its memory is needed."""
    generation: int = 1
