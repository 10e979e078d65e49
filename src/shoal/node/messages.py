"""Questions that nodes ask each other through `calls`, and the keys of what they broadcast."""

from typing import Final

import msgspec

from shoal.fleet.spec import DeploymentSpec
from shoal.fleet.views import EventView, NodeView
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.model.frontier import Block
from shoal.model.spec import ModelSpec
from shoal.plan.problem import Answer, Infeasible, Plan, Problem
from shoal.profile.fleet import DeviceProfile, LinkProfile

VIEW: Final = "view"
"""Kind of the event that carries a CoordinatorView."""

REPORT: Final = "report"
"""Verb of a worker's reports to its agent."""

WIRE: Final = "wire"
"""Verb of an agent's wiring of its worker."""


class Nothing(msgspec.Struct, frozen=True, kw_only=True):
    """No answer beyond that it was done."""


class ProfileModel(msgspec.Struct, frozen=True, kw_only=True):
    """Measure this model's blocks on the asked node; chunks come from *sources*."""

    manifest: Digest
    sources: tuple[NodeId, ...]
    again: bool = False
    """Measure even if a profile is cached."""


class ModelBlocks(msgspec.Struct, frozen=True, kw_only=True):
    """Which blocks has this model?"""

    manifest: Digest


class BlocksOf(msgspec.Struct, frozen=True, kw_only=True):
    """Its blocks and facts."""

    spec: ModelSpec
    blocks: tuple[Block, ...]


class ProbeTarget(msgspec.Struct, frozen=True, kw_only=True):
    """A node and where its agent is dialled, as it said in its last report."""

    node: NodeId
    locators: tuple[str, ...]
    zid: str = ""
    """Of the agent's session; empty when it did not say, then whoever answers is believed."""


class ProbeLinks(msgspec.Struct, frozen=True, kw_only=True):
    """Measure the direct links from the asked node to these."""

    targets: tuple[ProbeTarget, ...]


class Links(msgspec.Struct, frozen=True, kw_only=True):
    """Measured links; a target that could not be dialled has none."""

    links: tuple[LinkProfile, ...]


class Profiled(msgspec.Struct, frozen=True, kw_only=True):
    """A device's trials of a model."""

    device: DeviceProfile


class Deploy(msgspec.Struct, frozen=True, kw_only=True):
    """Asked of the coordinator: make this deployment true (its generation is set by the coordinator)."""

    spec: DeploymentSpec
    previewed: Plan | None = None
    """What the asker was told that it would get."""


class Drop(msgspec.Struct, frozen=True, kw_only=True):
    """Asked of the coordinator: stop this deployment."""

    deployment: DeploymentId


class Wake(msgspec.Struct, frozen=True, kw_only=True):
    """Asked of the coordinator: have this deployment loaded, somebody asks for it."""

    deployment: DeploymentId


class Preview(msgspec.Struct, frozen=True, kw_only=True):
    """Asked of the coordinator: what plan would this deployment get?"""

    spec: DeploymentSpec


class Previewed(msgspec.Struct, frozen=True, kw_only=True):
    """The plan, or why there is none."""

    answer: Answer


class AskProblem(msgspec.Struct, frozen=True, kw_only=True):
    """Asked of the coordinator: what would a plan of this deployment be made from?"""

    spec: DeploymentSpec


class Stated(msgspec.Struct, frozen=True, kw_only=True):
    """The problem, or why it cannot even be stated."""

    problem: Problem | None = None
    refused: Infeasible | None = None


class AskNodes(msgspec.Struct, frozen=True, kw_only=True):
    """Asked of the coordinator: which nodes are there?"""


class Nodes(msgspec.Struct, frozen=True, kw_only=True):
    """Every node that is known."""

    nodes: tuple[NodeView, ...]


class AskProfile(msgspec.Struct, frozen=True, kw_only=True):
    """Asked of the coordinator: what can these nodes (all when empty) do for this model?"""

    manifest: Digest
    source: NodeId
    nodes: tuple[NodeId, ...] = ()
    again: bool = False


class AskEvents(msgspec.Struct, frozen=True, kw_only=True):
    """Asked of the coordinator: what happened?"""

    after: int
    limit: int


class Events(msgspec.Struct, frozen=True, kw_only=True):
    """Events, oldest first."""

    events: tuple[EventView, ...]


class Leave(msgspec.Struct, frozen=True, kw_only=True):
    """Asked of a node: give your shards up, then go."""
