"""Declared work: what an operator wants to be true."""

import msgspec

from shoal.ids import DeploymentId, Digest, NodeId
from shoal.plan.problem import Choose, Cloud, Limits, Objective, Pin, Relays, RequestShape, Residency


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
    generation: int = 1
