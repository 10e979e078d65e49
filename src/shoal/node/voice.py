"""What a node says to others: orders, wirings and the coordinator's view, each put on its key."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import anyio
import anyio.to_thread
import msgspec
from msgspec.msgpack import Decoder

from shoal.fleet.order import Reply
from shoal.fleet.reconcile import Addressed
from shoal.fleet.view import CoordinatorView
from shoal.ids import NodeId
from shoal.node.messages import VIEW, WIRE
from shoal.node.worker_spec import Wiring
from shoal.transport.bus import Bus
from shoal.transport.keys import ControlTopic, EventTopic, WorkerTopic, key_of
from shoal.transport.parse import parse

ORDER_TIMEOUT_S = 1.0
_REPLY: Decoder[Reply] = Decoder(Reply)


@dataclass(slots=True)
class Bell:
    """Rung when something changed that the next heartbeat should not wait for; belongs to the event loop."""

    _rung: anyio.Event = field(default_factory=anyio.Event)

    def ring(self) -> None:
        """Wake whoever waits."""
        self._rung.set()

    async def wait(self) -> None:
        """Return at the next ring, at once if it rang since the last wait."""
        await self._rung.wait()
        self._rung = anyio.Event()


@dataclass(frozen=True, slots=True)
class Voice:
    """A node's voice on the bus; `on_view` hears our own broadcasts without a detour."""

    bus: Bus
    fleet: str
    me: NodeId
    on_view: Callable[[CoordinatorView], None]

    def tell_worker(self, wiring: Wiring) -> None:
        """Pass a wiring on to the worker that it is for."""
        shard = wiring.shard
        topic = WorkerTopic(
            fleet=self.fleet,
            node=self.me,
            deployment=shard.deployment,
            plan_epoch=shard.plan_epoch,
            stage=shard.stage,
            verb=WIRE,
        )
        self.bus.put(key_of(topic), msgspec.msgpack.encode(wiring))

    def broadcast(self, view: CoordinatorView) -> None:
        """Tell everybody what the coordinator decided; ourselves at once."""
        self.on_view(view)
        self.bus.put(key_of(EventTopic(fleet=self.fleet, node=self.me, kind=VIEW)), msgspec.msgpack.encode(view))

    async def send_order(self, addressed: Addressed) -> Reply:
        """Give an order to a node; raises UnavailableError when it does not answer, MalformedFrameError when oddly."""
        key = key_of(ControlTopic(fleet=self.fleet, node=addressed.node, verb="order"))
        payload = msgspec.msgpack.encode(addressed.order)
        query = partial(self.bus.query, key, payload, timeout_s=ORDER_TIMEOUT_S)
        raw = await anyio.to_thread.run_sync(query, abandon_on_cancel=True)
        return parse(raw, _REPLY, f"reply of node {addressed.node}")
