"""What happened in the fleet, kept in a ring for people and programs that ask later."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from structlog.typing import FilteringBoundLogger

from shoal.fleet.views import EventView
from shoal.ids import DeploymentId, NodeId

KEPT_EVENTS = 2000
PER_LEASE = 10**9


@dataclass(slots=True)
class EventRing:
    """The last events, oldest first.  Belongs to the event loop."""

    log: FilteringBoundLogger
    unix_s: Callable[[], float]
    _events: deque[EventView] = field(default_factory=lambda: deque(maxlen=KEPT_EVENTS))
    _next: int = 1

    def note(self, kind: str, text: str, *, node: NodeId | None = None, deployment: DeploymentId | None = None) -> None:
        """Keep an event and log it."""
        event = EventView(
            sequence=self._next, kind=kind, node=node, deployment=deployment, unix_s=self.unix_s(), text=text
        )
        self._next += 1
        self._events.append(event)
        where = {k: v for k, v in (("node", node), ("deployment", deployment)) if v is not None}
        self.log.info(kind, detail=text, **where)

    def begin(self, fencing_epoch: int) -> None:
        """Number what follows above everything that holders of earlier leases have numbered, on whatever node."""
        self._next = max(self._next, fencing_epoch * PER_LEASE)

    async def events(self, after: int, limit: int) -> Sequence[EventView]:
        """At most *limit* events with a sequence above *after*."""
        return [event for event in self._events if event.sequence > after][:limit]
