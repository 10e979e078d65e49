"""What the coordinator tells everybody, twice a second and on each change: its lease, the declared work and the plans.

Gateways route by it, a standby takes over from it, and a node that sees a higher fencing epoch knows whom to obey.
"""

import msgspec

from shoal.fleet.deployment import Deployment
from shoal.fleet.reconcile import Phase
from shoal.ids import DeploymentId, NodeId

LEASE_S = 3.0
"""A holder that has not been heard for that long does not hold the lease any more."""


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """Who coordinates.  A higher `fencing_epoch` ends every lower one (ADR 5)."""

    holder: NodeId
    fencing_epoch: int

    @property
    def rank(self) -> tuple[int, NodeId]:
        """Of two leases the greater counts."""
        return self.fencing_epoch, self.holder


class DeploymentStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A deployment, its plan and where it stands; `reason` says why it is not serving."""

    deployment: Deployment
    phase: Phase
    reason: str = ""
    gateway: str = ""
    """Where it is asked; empty while its source node is not heard."""
    first_birth: int = 0
    """Which worker has the first stage (`ShardReport.birth`): what another one was asked, this one knows nothing of."""
    busy: tuple[float | None, ...] = ()
    """Of each stage of the plan, the share of the last seconds that its engine has worked; None where nobody has said."""


class CoordinatorView(msgspec.Struct, frozen=True, kw_only=True):
    """One broadcast; a higher (fencing epoch, sequence) is newer.

    Two that were cut off from each other may have taken the same epoch: then the greater name counts, everywhere alike.
    """

    lease: Lease
    sequence: int
    deployments: tuple[DeploymentStatus, ...] = ()

    def newer_than(self, other: "CoordinatorView | None") -> bool:
        """Whether this view replaces *other*."""
        if other is None:
            return True
        return (self.lease.rank, self.sequence) > (other.lease.rank, other.sequence)

    def find(self, name: DeploymentId) -> DeploymentStatus | None:
        """The deployment of that name, or None when there is none."""
        return next((d for d in self.deployments if d.deployment.spec.deployment == name), None)
