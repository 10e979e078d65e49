"""A node's agent: heartbeats out, orders in, and the ears of whatever else lives on the node (coordinator, gateway)."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import anyio
import anyio.to_thread
import msgspec
import psutil
from msgspec.msgpack import Decoder
from structlog.typing import FilteringBoundLogger

from shoal.errors import ShoalError, UnsupportedVersionError, UntrustedError
from shoal.fleet.order import Order, Refused, Reply
from shoal.fleet.report import NodeFacts, NodeReport, ShardReport, Use
from shoal.fleet.state import LOST_AFTER_S
from shoal.fleet.view import CoordinatorView
from shoal.ids import Digest, NodeId
from shoal.node.calls import CallDesk, Handler
from shoal.node.coordinator import Coordinator
from shoal.node.desk import handler
from shoal.node.journal import Journal
from shoal.node.last_plan import alone, recall, remember, says_the_same
from shoal.node.mailbox import Mailbox
from shoal.node.messages import REPORT, VIEW, Leave, Nothing
from shoal.node.shards import ShardKeeper
from shoal.node.voice import Bell
from shoal.transport.bus import Bus, Closable, Lane, Sample
from shoal.transport.keys import (
    AliveTopic,
    ControlTopic,
    EventTopic,
    HeartbeatTopic,
    WorkerTopic,
    key_of,
    pattern_of,
    topic_of,
)
from shoal.transport.parse import parse

HEARTBEAT_S = 0.2
LEAVE_S = 30.0
"""A leaving node goes after that, drained or not."""

Heard = NodeReport | CoordinatorView | ShardReport
Item = Heard | AliveTopic
"""What is heard, or whose process was seen to end."""


_ORDER: Decoder[Order] = Decoder(Order)


@dataclass(slots=True)
class Agent:
    """Owns the node's place in the fleet; runs on the event loop."""

    me: NodeId
    fleet: str
    incarnation: int
    facts: Callable[[], NodeFacts]
    bus: Bus
    keeper: ShardKeeper
    coordinator: Coordinator | None
    bell: Bell
    handlers: Mapping[str, Handler]
    complete_manifests: Callable[[], tuple[Digest, ...]]
    on_view: Callable[[CoordinatorView], None]
    uses: Callable[[], tuple[Use, ...]]
    """How much models are asked for here that are loaded on demand."""
    stand_in: Callable[[CoordinatorView], None]
    """Hears what the last plans come to while no coordinator has been heard since the start."""
    journal: Journal
    log: FilteringBoundLogger
    leaving: anyio.Event = field(default_factory=anyio.Event)
    led: bool = False
    """Whether a coordinator has been heard since the start."""
    _sequence: int = 0
    _manifests: tuple[Digest, ...] = ()
    _dropped: int = 0
    _unwritten: int = 0
    _kept: CoordinatorView | None = None
    _others: dict[NodeId, tuple[NodeReport, float]] = field(default_factory=dict)

    def report(self) -> NodeReport:
        """What the next heartbeat says."""
        self._sequence += 1
        return NodeReport(
            node=self.me,
            incarnation=self.incarnation,
            sequence=self._sequence,
            facts=self.facts(),
            load_1m=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
            memory_free_bytes=psutil.virtual_memory().available,
            shards=self.keeper.reports(),
            manifests=self._manifests,
            leaving=self.leaving.is_set(),
            uses=self.uses(),
        )

    async def run(self) -> None:
        """Work until cancelled, or until this node has left the fleet."""
        heard: Mailbox[Item] = Mailbox()
        listening = self._listen(heard)
        handlers = {**self.handlers, "leave": handler(Leave, self._leave)}
        desk = CallDesk(self.bus, self.fleet, self.me, handlers)
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self.keeper.run)
                group.start_soon(desk.run)
                group.start_soon(self._beat)
                group.start_soon(self._look_at_store)
                group.start_soon(self._hear, heard)
                group.start_soon(self._go_when_drained, group.cancel_scope)
                group.start_soon(self._stand_in)
                if self.coordinator is not None:
                    group.start_soon(self.coordinator.run)
        finally:
            for subscription in listening:
                subscription.close()
            heard.discard()

    async def _leave(self, _: Leave) -> Nothing:
        self.leaving.set()
        self.bell.ring()
        return Nothing()

    async def _go_when_drained(self, scope: anyio.CancelScope) -> None:
        await self.leaving.wait()
        with anyio.move_on_after(LEAVE_S):
            await anyio.sleep(1.0)  # some heartbeats: the coordinator must hear it before we are gone
            while self.keeper.reports():  # noqa: ASYNC110 - the keeper's state, looked at rarely
                await anyio.sleep(0.1)
        scope.cancel()

    def _listen(self, heard: Mailbox[Item]) -> list[Closable]:
        def into(kind: type[Heard]) -> Callable[[Sample], None]:
            decoder: Decoder[Heard] = Decoder(kind)

            def deliver(sample: Sample) -> None:
                try:
                    heard.post(parse(sample.payload, decoder, kind.__name__))
                except UntrustedError as error:
                    self._drop(sample, error)

            return deliver

        def vanished(key: str) -> None:
            topic = topic_of(key)
            if isinstance(topic, AliveTopic):
                heard.post(topic)

        reports = pattern_of(WorkerTopic, fleet=self.fleet, node=self.me, verb=REPORT)
        orders = pattern_of(ControlTopic, fleet=self.fleet, node=self.me, verb="order")
        return [
            self.bus.subscribe(pattern_of(HeartbeatTopic, fleet=self.fleet), into(NodeReport)),
            self.bus.subscribe(pattern_of(EventTopic, fleet=self.fleet, kind=VIEW), into(CoordinatorView)),
            self.bus.subscribe(reports, into(ShardReport)),
            self.bus.answer(orders, self._take_order),
            self.bus.watch(pattern_of(AliveTopic, fleet=self.fleet), vanished),
            self.bus.alive(key_of(AliveTopic(fleet=self.fleet, node=self.me, incarnation=self.incarnation))),
        ]

    def _take_order(self, sample: Sample) -> bytes:
        """On a thread of the bus."""
        reply: Reply
        try:
            reply = self.keeper.offer(parse(sample.payload, _ORDER, "known order", unknown=UnsupportedVersionError))
        except UnsupportedVersionError as error:
            reply = Refused(code=error.code, text=error.message, fencing_epoch=self.keeper.fencing_epoch)
        return msgspec.msgpack.encode(reply)

    def _drop(self, sample: Sample, error: UntrustedError) -> None:
        # A node of another version, or garbage: dropped and counted, said once per thousand (values that travel tolerate
        # unknown fields, so only real strangers end here).
        self._dropped += 1
        if self._dropped % 1000 == 1:
            self.log.warning("message.dropped", key=sample.key, error=error.message, dropped=self._dropped)

    async def _hear(self, heard: Mailbox[Item]) -> None:
        async for item in heard:
            match item:
                case NodeReport():
                    if not self.led:
                        self._others[item.node] = (item, anyio.current_time())
                    if self.coordinator is not None:
                        self.coordinator.hear_report(item)
                case AliveTopic(node=node, incarnation=incarnation):
                    if self.coordinator is not None:
                        self.coordinator.hear_vanished(node, incarnation)
                case CoordinatorView():
                    if self.coordinator is not None:
                        self.coordinator.hear_view(item)
                    self.on_view(item)
                    await self._follow(item)
                case ShardReport():
                    self.keeper.worker_said(item)

    async def _follow(self, view: CoordinatorView) -> None:
        """Obey the newest lease, and keep what it says for the day when nobody is there to say it.

        What the disk does not take is tried again at the next broadcast; what serves goes on meanwhile.
        """
        self.led = True
        try:
            if view.lease.fencing_epoch > self.keeper.fencing_epoch:
                await anyio.to_thread.run_sync(self.keeper.obey, view.lease.fencing_epoch)
            if view.newer_than(self._kept) and not says_the_same(view, self._kept):
                await anyio.to_thread.run_sync(remember, self.journal, view)
                self._kept = view
        except ShoalError as error:
            self._unwritten += 1
            if self._unwritten % 100 == 1:
                self.log.warning("view.not_kept", error=str(error), not_kept=self._unwritten)

    async def _stand_in(self) -> None:
        """Serve by the last plans until a coordinator is heard."""
        self._kept = await anyio.to_thread.run_sync(recall, self.journal)
        said: CoordinatorView | None = None
        while self._kept is not None and not self.led:
            now = alone(self._kept, self.report(), self._neighbours())
            if now != said:
                self.stand_in(now)
                said = now
            await anyio.sleep(HEARTBEAT_S)

    def _neighbours(self) -> dict[NodeId, NodeReport]:
        """Newest reports of the other nodes that are heard."""
        since_s = anyio.current_time() - LOST_AFTER_S
        return {n: r for n, (r, heard_s) in self._others.items() if heard_s > since_s and n != self.me}

    async def _beat(self) -> None:
        key = key_of(HeartbeatTopic(fleet=self.fleet, node=self.me))
        while True:
            self.bus.put(key, msgspec.msgpack.encode(self.report()), lane=Lane.CONTROL)
            with anyio.move_on_after(HEARTBEAT_S):
                await self.bell.wait()

    async def _look_at_store(self) -> None:
        while True:
            self._manifests = await anyio.to_thread.run_sync(self.complete_manifests)
            await anyio.sleep(2.0)
