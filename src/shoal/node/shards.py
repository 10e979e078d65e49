"""The shards that this node holds: takes orders, keeps one worker process per shard, reports how far each has come."""

import contextlib
import secrets
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, assert_never

import anyio
import anyio.abc
import anyio.to_thread
import msgspec
from structlog.typing import FilteringBoundLogger

from shoal.errors import ShoalError
from shoal.fleet.order import Accepted, Hold, Order, Refused, Reply, Retire, Wire
from shoal.fleet.report import ShardId, ShardReport, ShardState
from shoal.node.heap import give_back_memory
from shoal.node.journal import Journal
from shoal.node.last_plan import forget_port, keep_port
from shoal.node.mailbox import Mailbox
from shoal.node.worker_spec import Wiring


class WorkerHandle(Protocol):
    """A running worker."""

    async def wait(self) -> str:
        """Return when it has ended, with the reason in words."""
        ...

    async def stop(self, *, at_once: bool = False) -> None:
        """End it and wait until its memory is back, without a farewell if *at_once*; harmless when repeated."""
        ...


Fetch = Callable[[Hold, Callable[[int], None]], Awaitable[None]]
"""Get the chunks of a shard onto this node's disk; the callback takes bytes as they arrive."""

Launch = Callable[[Hold, int], Awaitable[WorkerHandle]]
"""Start the worker of a shard; the number is its birth (`ShardReport.birth`)."""


LOOK_EVERY_S = 0.5
_SILENT_LOOKS = 5
"""So often in a row may nothing have come from a worker that has loaded: 2.5 to 3 s, five of its reports, as long as for a node.
Looks are counted rather than seconds, for a node that was itself frozen must not hold that against its workers."""
_LOADING_LOOKS = 240
"""The same while it loads: some engines keep the interpreter to themselves meanwhile, and small machines are slow to start."""


def draw_birth() -> int:
    """A number that no other worker has."""
    return secrets.randbits(32) | 1


class _Fence(msgspec.Struct, frozen=True, kw_only=True):
    epoch: int


@dataclass(slots=True)
class _Kept:
    hold: Hold
    report: ShardReport
    scope: anyio.CancelScope
    before: "_Kept | None" = None
    """The same shard in an earlier attempt, which this one takes the place of."""
    at_once: bool = False
    """Its worker is not to be trusted with a farewell."""
    wiring: Wiring | None = None
    silent_looks: int = 0
    port: int = 0
    """Of the worker's data session, as it is on disk."""
    may_load: anyio.Event = field(default_factory=anyio.Event)
    ended: anyio.Event = field(default_factory=anyio.Event)


class ShardKeeper:
    """Owns the node's shards.  `offer` may be called from any thread, the rest belongs to the event loop.

    What the journal does not take is not done: a full disk delays orders (they come again), and ends nothing that serves.
    """

    def __init__(
        self,
        journal: Journal,
        fetch: Fetch,
        launch: Launch,
        tell: Callable[[Wiring], None],
        changed: Callable[[], None],
        log: FilteringBoundLogger,
        *,
        look_every_s: float = LOOK_EVERY_S,
        new_birth: Callable[[], int] = draw_birth,
    ) -> None:
        self.undone = 0
        """Orders that were taken and could not be followed."""
        self._log = log
        self._journal = journal
        self._fetch = fetch
        self._launch = launch
        self._tell = tell
        self._changed = changed
        self._look_every_s = look_every_s
        self._new_birth = new_birth
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

    def worker_said(self, said: ShardReport) -> None:
        """Note a worker's report; one of a shard that we no longer hold is dropped.

        The worker knows everything about its shard but what this node promised and fetched for it.
        """
        kept = self._kept.get(said.shard)
        if kept is None or kept.report.state is ShardState.FAILED or said.birth not in {0, kept.report.birth}:
            return
        ours, kept.silent_looks = kept.report, 0
        told = msgspec.structs.replace(
            said,
            attempt=ours.attempt,
            birth=ours.birth,
            memory_bytes=ours.memory_bytes,
            fetched_bytes=ours.fetched_bytes,
        )
        self._become(kept, told)
        if said.state is ShardState.READY and kept.wiring is not None:
            self._tell(kept.wiring)

    async def run(self) -> None:
        """Follow orders until cancelled, then end every worker."""
        try:
            async with anyio.create_task_group() as group:
                await self._work(group)
        finally:
            self._orders.discard()

    async def _work(self, group: anyio.abc.TaskGroup) -> None:
        for hold in self._journal.all("hold", Hold):
            self._start(hold, group)
        for wire in self._journal.all("wire", Wire):
            self._wire(wire)
        async for order in self._orders:
            try:
                await self._follow(order, group)
            except ShoalError as error:
                self.undone += 1
                if self.undone % 100 == 1:
                    self._log.warning(
                        "order.not_followed", shard=str(order.shard), error=str(error), undone=self.undone
                    )

    async def _follow(self, order: Order, group: anyio.abc.TaskGroup) -> None:
        match order:
            case Hold():
                await self._hold(order, group)
            case Wire():
                await anyio.to_thread.run_sync(lambda: self._journal.put("wire", str(order.shard), order))
                self._wire(order)
            case Retire(shard=shard, attempt=attempt):
                kept = self._kept.get(shard)
                if kept is None or attempt is None or kept.hold.attempt <= attempt:
                    await self._give_up(shard, at_once=attempt is not None)
            case _:
                assert_never(order)

    async def _hold(self, order: Hold, group: anyio.abc.TaskGroup) -> None:
        kept = self._kept.get(order.shard)
        again = kept is not None and order.attempt > kept.hold.attempt
        if kept is not None and not again and (kept.hold.load or not order.load):
            return
        for elder in self._elders(order) if order.load else ():
            await self._give_up(elder)
        if kept is not None and again:
            await self._give_up(order.shard, at_once=True)  # with its wiring: the one that comes is wired anew
        await anyio.to_thread.run_sync(lambda: self._journal.put("hold", str(order.shard), order))
        self._start(order, group, kept) if kept is None or again else self._load(kept, order)

    async def _give_up(self, shard: ShardId, *, at_once: bool = False) -> None:
        # Its memory first, which others wait for.  A record that stays takes the shard up again at the next start, and the
        # coordinator, which sees it then, has it given up again.
        if shard in self._kept:
            self._kept[shard].at_once = at_once
            self._kept[shard].scope.cancel()
        for kind in ("hold", "wire"):
            await anyio.to_thread.run_sync(self._journal.remove, kind, str(shard))
        await anyio.to_thread.run_sync(forget_port, self._journal, shard)

    def _elders(self, hold: Hold) -> list[ShardId]:
        """Shards of earlier plans of the same deployment: the memory for this one is theirs, unless it is beside them."""
        mine = [s for s in self._kept if s.deployment == hold.shard.deployment]
        return [s for s in mine if s.plan_epoch < hold.shard.plan_epoch and s.plan_epoch not in hold.beside]

    def _load(self, kept: _Kept, hold: Hold) -> None:
        """What was only fetched may be loaded now."""
        kept.hold = hold
        self._note(kept, memory_bytes=hold.memory_bytes)
        kept.may_load.set()

    def _wire(self, order: Wire) -> None:
        kept = self._kept.get(order.shard)
        if kept is None:
            return
        kept.wiring = Wiring(
            shard=order.shard,
            next_node=order.next_node,
            next_locators=order.next_locators,
            next_birth=order.next_birth,
            birth=kept.report.birth,
        )
        if kept.report.state in {ShardState.READY, ShardState.WIRED}:
            self._tell(kept.wiring)

    def _start(self, hold: Hold, group: anyio.abc.TaskGroup, before: _Kept | None = None) -> None:
        report = ShardReport(
            shard=hold.shard,
            state=ShardState.FETCHING,
            start=hold.start,
            stop=hold.stop,
            attempt=hold.attempt,
            memory_bytes=hold.memory_bytes,
        )
        kept = _Kept(hold=hold, report=report, scope=anyio.CancelScope(), before=before)
        self._kept[hold.shard] = kept
        self._changed()
        group.start_soon(self._keep, kept)

    async def _keep(self, kept: _Kept) -> None:
        with kept.scope:
            try:
                await self._fetch(kept.hold, lambda n: self._note(kept, fetched_bytes=kept.report.fetched_bytes + n))
                if not kept.hold.load:
                    self._note(kept, state=ShardState.FETCHED)
                    await kept.may_load.wait()
                for elder in [self._kept[shard] for shard in self._elders(kept.hold)]:
                    await elder.ended.wait()
                if kept.before is not None:
                    await kept.before.ended.wait()
                    kept.before = None
                self._note(kept, state=ShardState.LOADING, birth=self._new_birth())
                worker = await self._launch(kept.hold, kept.report.birth)
                try:
                    ended = await self._outlive(kept, worker)
                    if kept.report.state is not ShardState.FAILED:
                        self._note(kept, state=ShardState.FAILED, error_code="shard_lost", error=ended)
                finally:
                    with anyio.CancelScope(shield=True):
                        await worker.stop(at_once=kept.at_once)
            except ShoalError as error:
                self._note(kept, state=ShardState.FAILED, error_code=error.code, error=error.message)
            except Exception as error:  # noqa: BLE001 whatever ails one shard, the node and its other shards go on
                said = f"{type(error).__name__}: {error}"
                self._note(kept, state=ShardState.FAILED, error_code="unavailable", error=said)
            # A failed shard stays in the reports until it is retired: that is how the coordinator learns of it.
            await anyio.sleep_forever()
        if self._kept.get(kept.hold.shard) is kept:
            del self._kept[kept.hold.shard]
        kept.ended.set()
        self._changed()
        await anyio.to_thread.run_sync(give_back_memory)

    async def _outlive(self, kept: _Kept, worker: WorkerHandle) -> str:
        """Wait until the worker has ended or has fallen silent; how that was, in words."""
        said: list[str] = []

        async def until_ended(scope: anyio.CancelScope) -> None:
            said.append(await worker.wait())
            scope.cancel()

        async with anyio.create_task_group() as group:
            group.start_soon(until_ended, group.cancel_scope)
            while True:
                await anyio.sleep(self._look_every_s)
                await self._keep_port(kept)
                kept.silent_looks += 1
                loading = kept.report.state is ShardState.LOADING
                if kept.silent_looks > (_LOADING_LOOKS if loading else _SILENT_LOOKS):
                    silent_s, kept.at_once = kept.silent_looks * self._look_every_s, True
                    said.append(f"its worker has said nothing for {silent_s:g} s and was ended")
                    group.cancel_scope.cancel()
        return said[0]

    async def _keep_port(self, kept: _Kept) -> None:
        """Have the worker's port on disk; what the disk does not take is tried again at the next look."""
        port = port_of(kept.report.locators)
        if port and port != kept.port:
            with contextlib.suppress(ShoalError):
                await anyio.to_thread.run_sync(keep_port, self._journal, kept.hold.shard, port)
                kept.port = port

    def _note(self, kept: _Kept, **fields: object) -> None:
        self._become(kept, msgspec.structs.replace(kept.report, **fields))

    def _become(self, kept: _Kept, report: ShardReport) -> None:
        before, kept.report = kept.report, report
        if (before.state, before.locators) != (kept.report.state, kept.report.locators):
            self._changed()


def port_of(locators: Sequence[str]) -> int:
    """The port of a session, which is the same on each of its addresses; 0 when it says none."""
    port = locators[0].rpartition(":")[2] if locators else ""
    return int(port) if port.isdecimal() else 0
