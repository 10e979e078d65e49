"""The shards that this node holds: takes orders, keeps one worker process per shard, reports how far each has come."""

import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, assert_never

import anyio
import anyio.abc
import anyio.to_thread
import msgspec

from shoal.errors import ShoalError
from shoal.fleet.order import Accepted, Hold, Order, Refused, Reply, Retire, Wire
from shoal.fleet.report import ShardId, ShardReport, ShardState
from shoal.node.journal import Journal
from shoal.node.mailbox import Mailbox
from shoal.node.worker_spec import Wiring, WorkerReport


class WorkerHandle(Protocol):
    """A running worker."""

    async def wait(self) -> str:
        """Return when it has ended, with the reason in words."""
        ...

    async def stop(self) -> None:
        """End it and wait until its memory is back; harmless when repeated."""
        ...


Fetch = Callable[[Hold, Callable[[int], None]], Awaitable[None]]
"""Get the chunks of a shard onto this node's disk; the callback takes bytes as they arrive."""

Launch = Callable[[Hold], Awaitable[WorkerHandle]]


class _Fence(msgspec.Struct, frozen=True, kw_only=True):
    epoch: int


@dataclass(slots=True)
class _Kept:
    hold: Hold
    report: ShardReport
    scope: anyio.CancelScope
    wiring: Wiring | None = None


class ShardKeeper:
    """Owns the node's shards.  `offer` may be called from any thread, the rest belongs to the event loop."""

    def __init__(
        self,
        journal: Journal,
        fetch: Fetch,
        launch: Launch,
        tell: Callable[[Wiring], None],
        changed: Callable[[], None],
    ) -> None:
        self._journal = journal
        self._fetch = fetch
        self._launch = launch
        self._tell = tell
        self._changed = changed
        self._kept: dict[ShardId, _Kept] = {}
        self._orders: Mailbox[Order] = Mailbox()
        self._fence_lock = threading.Lock()
        fence = journal.get("fence", "epoch", _Fence)
        self._fencing_epoch = fence.epoch if fence else 0

    @property
    def fencing_epoch(self) -> int:
        """The newest lease that this node has obeyed."""
        return self._fencing_epoch

    def offer(self, order: Order) -> Reply:
        """Take an order unless a newer lease is known; the fence is durable before the order is taken."""
        if not self.obey(order.fencing_epoch):
            text = f"order of lease {order.fencing_epoch}, this node obeys lease {self._fencing_epoch}"
            return Refused(code="stale_lease", text=text, fencing_epoch=self._fencing_epoch)
        self._orders.post(order)
        return Accepted()

    def obey(self, fencing_epoch: int) -> bool:
        """Refuse older leases from now on, durably; False when this one is too old itself.  May wait for the disk."""
        with self._fence_lock:
            if fencing_epoch > self._fencing_epoch:
                self._journal.put("fence", "epoch", _Fence(epoch=fencing_epoch), generation=fencing_epoch)
                self._fencing_epoch = fencing_epoch
            return fencing_epoch == self._fencing_epoch

    def reports(self) -> tuple[ShardReport, ...]:
        """Where every shard stands."""
        return tuple(kept.report for kept in self._kept.values())

    def worker_said(self, said: WorkerReport) -> None:
        """Note a worker's report; one of a shard that we no longer hold is dropped."""
        kept = self._kept.get(said.shard)
        if kept is None or kept.report.state is ShardState.FAILED:
            return
        fields = {
            f: getattr(said, f)
            for f in (
                "state",
                "locators",
                "wired_to",
                "error_code",
                "error",
                "steps",
                "busy_s",
                "live_requests",
                "waiting_requests",
            )
        }
        self._note(kept, **fields)
        if said.state is ShardState.READY and kept.wiring is not None:
            self._tell(kept.wiring)

    async def run(self) -> None:
        """Follow orders until cancelled, then end every worker."""
        async with anyio.create_task_group() as group:
            for hold in self._journal.all("hold", Hold):
                self._start(hold, group)
            for wire in self._journal.all("wire", Wire):
                self._wire(wire)
            async for order in self._orders:
                await self._follow(order, group)

    async def _follow(self, order: Order, group: anyio.abc.TaskGroup) -> None:
        match order:
            case Hold():
                kept = self._kept.get(order.shard)
                if kept is None:
                    await anyio.to_thread.run_sync(lambda: self._journal.put("hold", str(order.shard), order))
                    self._start(order, group)
            case Wire():
                await anyio.to_thread.run_sync(lambda: self._journal.put("wire", str(order.shard), order))
                self._wire(order)
            case Retire(shard=shard):
                self._journal.remove("hold", str(shard))
                self._journal.remove("wire", str(shard))
                if shard in self._kept:
                    self._kept[shard].scope.cancel()
            case _:
                assert_never(order)

    def _wire(self, order: Wire) -> None:
        kept = self._kept.get(order.shard)
        if kept is None:
            return
        kept.wiring = Wiring(shard=order.shard, next_node=order.next_node, next_locators=order.next_locators)
        if kept.report.state is ShardState.READY:
            self._tell(kept.wiring)

    def _start(self, hold: Hold, group: anyio.abc.TaskGroup) -> None:
        report = ShardReport(
            shard=hold.shard,
            state=ShardState.FETCHING,
            start=hold.start,
            stop=hold.stop,
            memory_bytes=hold.memory_bytes,
        )
        kept = _Kept(hold=hold, report=report, scope=anyio.CancelScope())
        self._kept[hold.shard] = kept
        self._changed()
        group.start_soon(self._keep, kept)

    async def _keep(self, kept: _Kept) -> None:
        with kept.scope:
            try:
                await self._fetch(kept.hold, lambda n: self._note(kept, fetched_bytes=kept.report.fetched_bytes + n))
                self._note(kept, state=ShardState.LOADING)
                worker = await self._launch(kept.hold)
                try:
                    ended = await worker.wait()
                finally:
                    with anyio.CancelScope(shield=True):
                        await worker.stop()
                if kept.report.state is not ShardState.FAILED:
                    self._note(kept, state=ShardState.FAILED, error_code="shard_lost", error=ended)
            except ShoalError as error:
                self._note(kept, state=ShardState.FAILED, error_code=error.code, error=error.message)
            except OSError as error:
                self._note(kept, state=ShardState.FAILED, error_code="unavailable", error=str(error))
            # A failed shard stays in the reports until it is retired: that is how the coordinator learns of it.
            await anyio.sleep_forever()
        del self._kept[kept.hold.shard]
        self._changed()

    def _note(self, kept: _Kept, **fields: object) -> None:
        before = kept.report
        kept.report = msgspec.structs.replace(before, **fields)
        if (before.state, before.locators) != (kept.report.state, kept.report.locators):
            self._changed()
