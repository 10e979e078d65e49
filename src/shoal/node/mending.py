"""The coordinator's hand in mending: what has served and has lost a stage goes on with another worker for it.

Not all of it is here yet: what is lost is left to another plan.
"""

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import anyio.abc

from shoal.fleet.deployment import Deployment, MendingEnded, PlanServed
from shoal.fleet.losses import losses
from shoal.fleet.reconcile import Phase, heard, mendable, phase
from shoal.fleet.report import NodeReport
from shoal.fleet.state import Event, FleetState
from shoal.ids import DeploymentId, NodeId


@dataclass(slots=True)
class Mending:
    """Belongs to the event loop.  `apply` changes the coordinator's state; `keep` has a deployment on disk, sooner or later."""

    state: Callable[[], FleetState]
    apply: Callable[[Event], None]
    keep: Callable[[DeploymentId], Coroutine[Any, Any, None]]

    def tick(self, now_s: float, group: anyio.abc.TaskGroup) -> None:
        """Note what serves, and look at what is lost."""
        reports = heard(self.state(), now_s)
        for name, deployment in self.state().deployments.items():
            event = self._due(name, deployment, reports)
            if event is not None:
                self.apply(event)
                group.start_soon(self.keep, name)

    def _due(
        self, name: DeploymentId, deployment: Deployment, reports: Mapping[NodeId, NodeReport]
    ) -> PlanServed | MendingEnded | None:
        if not deployment.served or deployment.beyond_mending:
            serves = phase(deployment, reports) is Phase.SERVING
            return PlanServed(deployment=name, plan_epoch=deployment.plan_epoch) if serves else None
        if not mendable(deployment, reports):
            return None
        why = losses(deployment, reports)[0].why
        return MendingEnded(deployment=name, plan_epoch=deployment.plan_epoch, mends=deployment.mends, why=why)
