"""A disk that is full: what needs it waits, what serves goes on, and when there is room again all is made good.

The journal is real; SQLite itself says that it is full, because it may not grow by a page.
"""

import contextlib
import io
from collections.abc import AsyncIterator, Awaitable, Callable

import anyio
import msgspec
import pytest
from structlog.typing import FilteringBoundLogger

from shoal.clock import SystemClock
from shoal.errors import StorageFullError
from shoal.fleet.order import Accepted, Hold, Reply, Retire
from shoal.fleet.reconcile import Addressed
from shoal.fleet.report import NodeFacts, NodeReport, ShardId, ShardReport, ShardState
from shoal.fleet.spec import DeploymentSpec
from shoal.fleet.view import CoordinatorView, Lease
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.node.agent import Agent
from shoal.node.coordinator import Coordinator
from shoal.node.journal import Journal
from shoal.node.last_plan import recall
from shoal.node.messages import VIEW
from shoal.node.shards import ShardKeeper
from shoal.node.voice import Bell
from shoal.plan.problem import Answer, Infeasible, Problem
from shoal.profile.fleet import FleetProfile
from shoal.transport.keys import EventTopic, HeartbeatTopic, key_of
from shoal.transport.memory import MemoryBus

ME, OTHER, CHAT = NodeId("m" * 32), NodeId("o" * 32), DeploymentId("chat")
FACTS = NodeFacts(name="box", version="1", locators=(), cores=1, memory_total_bytes=9, memory_budget_bytes=9)


class Filler(msgspec.Struct, frozen=True):
    text: str


def fill(journal: Journal) -> None:
    """Let the database not grow any more, and fill what room its pages have."""
    journal._connection.execute("PRAGMA max_page_count=1")  # as many as it has now
    for size in (3000, 100, 1):
        with contextlib.suppress(StorageFullError):
            for number in range(10_000):
                journal.put("filler", f"{size} {number}", Filler("x" * size))
            pytest.fail("the disk does not get full")


def free(journal: Journal) -> None:
    journal._connection.execute("PRAGMA max_page_count=1000000")


async def until(true: Callable[[], object]) -> None:
    with anyio.fail_after(20):
        while not true():  # noqa: ASYNC110 - looked at from outside
            await anyio.sleep(0.005)


def hold(plan_epoch: int = 1, fencing_epoch: int = 1) -> Hold:
    return Hold(
        fencing_epoch=fencing_epoch, shard=ShardId(deployment=CHAT, plan_epoch=plan_epoch, stage=0), stages=1,
        manifest=Digest("0" * 64), start=0, stop=1, slots=1, context_tokens=16, in_flight=1, memory_bytes=10, sources=(),
    )  # fmt: skip


class Steady:
    """A worker that works until it is stopped."""

    async def wait(self) -> str:
        await anyio.sleep_forever()
        raise AssertionError

    async def stop(self, *, at_once: bool = False) -> None:
        return None


async def fetch(order: Hold, arrived: Callable[[int], None]) -> None:
    return None


async def launch(order: Hold, _birth: int) -> Steady:
    return Steady()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def keeper(journal: Journal, log: FilteringBoundLogger) -> ShardKeeper:
    return ShardKeeper(journal, fetch, launch, lambda _: None, lambda: None, log)


@contextlib.asynccontextmanager
async def running(run: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    async with anyio.create_task_group() as group:
        group.start_soon(run)
        yield
        group.cancel_scope.cancel()


pytestmark = pytest.mark.anyio


async def test_a_shard_that_serves_goes_on_and_orders_are_followed_once_there_is_room(
    journal: Journal, keeper: ShardKeeper, logged: io.StringIO
) -> None:
    other = msgspec.structs.replace(hold(), shard=ShardId(deployment=DeploymentId("other"), plan_epoch=1, stage=0))

    async with running(keeper.run):
        keeper.offer(hold())
        await until(lambda: [r.state for r in keeper.reports()] == [ShardState.LOADING])
        keeper.worker_said(ShardReport(shard=hold().shard, state=ShardState.WIRED, start=0, stop=1))
        fill(journal)

        assert isinstance(keeper.offer(other), Accepted)
        await until(lambda: keeper.undone == 1)
        assert [(r.shard, r.state) for r in keeper.reports()] == [(hold().shard, ShardState.WIRED)]
        assert "order.not_followed" in logged.getvalue()

        free(journal)
        keeper.offer(other)
        await until(lambda: {r.shard for r in keeper.reports()} == {hold().shard, other.shard})


async def test_a_shard_is_given_up_and_its_memory_is_back_though_the_disk_is_full(
    journal: Journal, keeper: ShardKeeper
) -> None:
    async with running(keeper.run):
        keeper.offer(hold())
        await until(keeper.reports)
        journal.close()  # takes no record either, whatever SQLite makes of a full disk
        keeper.offer(Retire(fencing_epoch=1, shard=hold().shard))
        await until(lambda: not keeper.reports())
        await until(lambda: keeper.undone == 1)


async def test_an_agent_goes_on_with_its_heartbeats_and_obeys_a_lease_once_there_is_room(
    journal: Journal, keeper: ShardKeeper, bus_of: Callable[[str], MemoryBus], log: FilteringBoundLogger
) -> None:
    bus, asking = bus_of("node"), bus_of("asking")
    beats: list[int] = []
    asking.subscribe(key_of(HeartbeatTopic(fleet="f", node=ME)), lambda _: beats.append(1))
    seen: list[CoordinatorView] = []
    agent = Agent(
        me=ME, fleet="f", incarnation=1, facts=lambda: FACTS, bus=bus, keeper=keeper, coordinator=None, bell=Bell(),
        handlers={}, complete_manifests=tuple, on_view=seen.append, uses=tuple, stand_in=lambda _: None, journal=journal, log=log,
    )  # fmt: skip

    def say(sequence: int) -> CoordinatorView:
        view = CoordinatorView(lease=Lease(holder=OTHER, fencing_epoch=7), sequence=sequence)
        asking.put(key_of(EventTopic(fleet="f", node=OTHER, kind=VIEW)), msgspec.msgpack.encode(view))
        return view

    async with running(agent.run):
        await until(lambda: beats)
        fill(journal)
        failed = journal.failed_writes
        for sequence in (1, 2):
            say(sequence)
        await until(lambda: len(seen) == 2 and journal.failed_writes == failed + 2)
        heard = len(beats)
        await until(lambda: len(beats) > heard)
        with pytest.raises(StorageFullError):
            keeper.offer(hold(fencing_epoch=7))  # whoever gives an order is told that this lease is not on disk
        assert keeper.fencing_epoch == 0

        free(journal)
        last = say(3)
        await until(lambda: keeper.fencing_epoch == 7 and recall(journal) == last)


class NoPlanner:
    async def survey(self, *_: object) -> FleetProfile:
        return FleetProfile(profile_epoch=1, devices=(), links=())

    async def plan(self, *_: object) -> Answer:
        return Infeasible(reason="nowhere", needed_bytes=1, available_bytes=0)

    async def state(self, *_: object) -> Problem | Infeasible:
        return Infeasible(reason="not weighed", needed_bytes=0, available_bytes=0)


async def obey(addressed: Addressed) -> Reply:
    return Accepted()


def coordinator(journal: Journal, noted: list[str], *, eager: bool = True) -> Coordinator:
    return Coordinator(
        me=ME, journal=journal, clock=SystemClock(), planner=NoPlanner(), send_order=obey, broadcast=lambda _: None,
        note=lambda kind, text, **_: noted.append(f"{kind}: {text}"), begin_log=lambda _: None, eager=eager, tick_s=0.01,
    )  # fmt: skip


async def test_a_lease_is_taken_once_there_is_room_and_other_coordinators_are_remembered_then(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.node.coordinator.RETRY_DISK_S", 0.02)
    noted: list[str] = []
    mine = coordinator(journal, noted)
    facts = msgspec.structs.replace(FACTS, coordinates=True)

    fill(journal)
    async with running(mine.run):
        await until(lambda: noted)
        assert noted[0].startswith("coordinator.not_written: journal ")
        mine.hear_report(NodeReport(node=OTHER, incarnation=1, sequence=1, facts=facts))
        await anyio.sleep(0.1)
        assert not mine.leading

        free(journal)
        await until(lambda: journal.all("peer", msgspec.Raw))


async def test_a_coordinator_that_leads_goes_on_and_tells_who_asks_for_more(journal: Journal) -> None:
    noted: list[str] = []
    mine = coordinator(journal, noted)

    async with running(mine.run):
        await until(lambda: mine.leading)
        fill(journal)
        with pytest.raises(StorageFullError):
            await mine.want(DeploymentSpec(deployment=CHAT, model="m", manifest=Digest("d"), source=ME))
        await anyio.sleep(0.05)
        assert mine.leading


async def test_a_plan_that_the_disk_does_not_take_is_in_force_and_counts_once(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[str] = []
    mine = coordinator(journal, noted)
    take = journal.next_number

    def number(name: str, *, above: int) -> int:
        found = take(name, above=above)
        if name == "plan":
            fill(journal)
        return found

    monkeypatch.setattr(journal, "next_number", number)
    async with running(mine.run):
        await until(lambda: mine.leading)
        mine.hear_report(NodeReport(node=ME, incarnation=1, sequence=1, facts=FACTS))
        await mine.want(DeploymentSpec(deployment=CHAT, model="m", manifest=Digest("d"), source=ME))
        await until(lambda: any(line.startswith("coordinator.not_written: journal ") for line in noted))
        await until(lambda: CHAT not in mine._patience._under_way)

        assert mine.state.deployments[CHAT].answer is not None
        assert not [line for line in noted if line.startswith("plan.failed")]
        assert mine._patience._vain[CHAT] == 0
