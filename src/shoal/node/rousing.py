"""A gateway has the coordinator wake what somebody asks for: it says so until the view shows that it was heard.

To wake is idempotent, and the view carries what becomes of it: a lost question, and a change of the coordinator, cost another one.
"""

from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import anyio

from shoal.errors import ShoalError, UnknownModelError
from shoal.ids import DeploymentId, NodeId
from shoal.node import messages
from shoal.node.calls import Caller

WAKE_S = 5.0
"""For the coordinator to note that somebody asks for a model; what comes of it, its view says."""

Wake = Callable[[NodeId, DeploymentId], Awaitable[None]]
"""Ask that coordinator to wake that deployment; raises ShoalError."""


async def wake_by_call(caller: Caller, coordinator: NodeId, name: DeploymentId) -> None:
    """See `Wake`."""
    await caller.call(coordinator, "wake", messages.Wake(deployment=name), messages.Nothing, timeout_s=WAKE_S)


async def wakes_nobody(_holder: NodeId, _name: DeploymentId) -> None:
    """Where no coordinator can be asked."""


@dataclass(slots=True)
class Rousing:
    """Belongs to the event loop."""

    wake: Wake
    _asking: defaultdict[DeploymentId, anyio.Lock] = field(default_factory=lambda: defaultdict(anyio.Lock))
    _trouble: dict[DeploymentId, str] = field(default_factory=dict)
    """Why the coordinator could not be asked last."""

    async def rouse(self, name: DeploymentId, holder: Callable[[], NodeId | None]) -> None:
        """Ask the coordinator that *holder* names, unless somebody has done so meanwhile: then it is None.

        Raises UnknownModelError when the deployment is gone; other failures are for the next time.
        """
        async with self._asking[name]:  # a crowd that waits for one model asks once
            asked = holder()
            if asked is None:
                return
            try:
                await self.wake(asked, name)
            except UnknownModelError:
                raise
            except ShoalError as error:
                self._trouble[name] = error.message
            else:
                self._trouble.pop(name, None)

    def trouble(self, name: DeploymentId) -> str:
        """Why nobody has woken it; empty where that is not known."""
        return self._trouble.get(name, "")
