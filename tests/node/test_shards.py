"""A node's shards: orders in, reports out, one worker each."""

import io
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import msgspec

from shoal.errors import StorageFullError
from shoal.fleet.order import Accepted, Hold, Refused, Retire, Wire
from shoal.fleet.report import ShardId, ShardReport, ShardState
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.node.journal import Journal
from shoal.node.last_plan import kept_port
from shoal.node.shards import ShardKeeper
from shoal.node.worker_spec import Wiring
from shoal.observe.log import set_up_logs

A = NodeId("a" * 32)


def shard(stage: int = 0, plan_epoch: int = 1) -> ShardId:
    return ShardId(deployment=DeploymentId("m"), plan_epoch=plan_epoch, stage=stage)


def hold(which: ShardId, fencing_epoch: int = 1) -> Hold:
    return Hold(
        fencing_epoch=fencing_epoch, shard=which, stages=2, manifest=Digest("d"), start=0, stop=3, slots=1,
        context_tokens=64, in_flight=1, memory_bytes=10, sources=(A,),
    )  # fmt: skip


def wire(which: ShardId) -> Wire:
    return Wire(fencing_epoch=1, shard=which, next_node=A, next_locators=("tcp/1.1.1.1:1",))


@dataclass
class Worker:
    """A worker that ends when it is told to."""

    log: list[str]
    ended: anyio.Event = field(default_factory=anyio.Event)
    reason: str = "stopped"

    async def wait(self) -> str:
        await self.ended.wait()
        return self.reason

    async def stop(self, *, at_once: bool = False) -> None:
        await anyio.sleep(0.02)  # giving memory back takes a while
        self.log.append("stopped")
        self.ended.set()

    def die(self, reason: str) -> None:
        self.reason = reason
        self.ended.set()


@dataclass
class Bench:
    """A keeper whose fetches and workers are at hand."""

    keeper: ShardKeeper
    workers: dict[ShardId, Worker]
    told: list[Wiring]
    log: list[str]

    def report(self, which: ShardId) -> ShardReport | None:
        return next((r for r in self.keeper.reports() if r.shard == which), None)

    async def until(self, condition: Callable[[], object]) -> None:
        with anyio.fail_after(10):
            while not condition():  # noqa: ASYNC110 - the keeper tells nobody when it is done
                await anyio.sleep(0.005)

    async def loading(self, which: ShardId) -> None:
        """Until its worker was started."""
        await self.until(lambda: which in self.workers)

    def says(self, which: ShardId, state: ShardState, **more: object) -> None:
        self.keeper.worker_said(ShardReport(shard=which, state=state, start=0, stop=3, **more))


def run(
    journal: Journal, use: Callable[[Bench], Awaitable[None]], *, full: bool = False, look_every_s: float = 60.0
) -> list[str]:
    """Run *use* with a keeper at work; what happened to its workers."""
    log: list[str] = []

    async def scenario() -> None:
        workers: dict[ShardId, Worker] = {}
        told: list[Wiring] = []

        async def fetch(order: Hold, arrived: Callable[[int], None]) -> None:
            log.append(f"fetch {order.shard}")
            arrived(3)
            arrived(4)
            if full:
                raise StorageFullError("the disk is full")

        async def launch(order: Hold, birth: int) -> Worker:
            log.append(f"launch {order.shard}")
            workers[order.shard] = Worker(log)
            return workers[order.shard]

        log_to = set_up_logs(io.StringIO())
        keeper = ShardKeeper(journal, fetch, launch, told.append, lambda: None, log_to, look_every_s=look_every_s)
        async with anyio.create_task_group() as group:
            group.start_soon(keeper.run)
            await use(Bench(keeper, workers, told, log))
            group.cancel_scope.cancel()

    anyio.run(scenario)
    return log


def test_a_shard_is_fetched_loaded_wired_and_given_up(journal: Journal) -> None:
    async def use(bench: Bench) -> None:
        assert isinstance(bench.keeper.offer(hold(shard())), Accepted)
        await bench.loading(shard())
        report = bench.report(shard())
        assert report is not None
        assert (report.state, report.fetched_bytes, report.memory_bytes) == (ShardState.LOADING, 7, 10)

        bench.says(shard(), ShardState.READY, locators=("tcp/here:1",))
        bench.keeper.offer(wire(shard()))
        await bench.until(lambda: bench.told)
        bench.says(shard(), ShardState.WIRED, live_requests=2)
        report = bench.report(shard())
        assert report is not None
        assert (report.state, report.live_requests) == (ShardState.WIRED, 2)
        assert (report.fetched_bytes, report.memory_bytes) == (7, 10), "what the worker cannot know stays"

        bench.keeper.offer(Retire(fencing_epoch=1, shard=shard()))
        await bench.until(lambda: not bench.keeper.reports())

    assert run(journal, use) == ["fetch m/1/0", "launch m/1/0", "stopped"]
    assert not journal.all("hold", Hold)


def test_a_shard_beside_an_earlier_plan_leaves_that_one_alone(journal: Journal) -> None:
    async def use(bench: Bench) -> None:
        for epoch in (1, 2):
            bench.keeper.offer(hold(shard(plan_epoch=epoch)))
            await bench.loading(shard(plan_epoch=epoch))
        bench.keeper.offer(msgspec.structs.replace(hold(shard(plan_epoch=3)), beside=(2,)))
        await bench.loading(shard(plan_epoch=3))

        assert [r.shard.plan_epoch for r in bench.keeper.reports()] == [2, 3]

    log = run(journal, use)
    assert log[: log.index("launch m/3/0")].count("stopped") == 1, "the first plan's, for the second"


def test_a_shard_that_is_told_to_wait_is_fetched_beside_the_earlier_plan_and_loaded_in_its_place(
    journal: Journal,
) -> None:
    async def use(bench: Bench) -> None:
        bench.keeper.offer(hold(shard()))
        await bench.loading(shard())
        fetched = msgspec.structs.replace(hold(shard(plan_epoch=2)), load=False, beside=(1,))
        for _ in range(2):
            bench.keeper.offer(fetched)
        await bench.until(lambda: (r := bench.report(shard(plan_epoch=2))) and r.state is ShardState.FETCHED)
        assert bench.report(shard()) is not None
        assert shard(plan_epoch=2) not in bench.workers

        bench.keeper.offer(hold(shard(plan_epoch=2)))
        await bench.loading(shard(plan_epoch=2))
        assert [r.shard for r in bench.keeper.reports()] == [shard(plan_epoch=2)]

    assert run(journal, use)[:5] == ["fetch m/1/0", "launch m/1/0", "fetch m/2/0", "stopped", "launch m/2/0"]
    assert [(h.shard.plan_epoch, h.load) for h in journal.all("hold", Hold)] == [(2, True)], "as a restart will need it"


def test_an_order_that_is_given_again_changes_nothing(journal: Journal) -> None:
    async def use(bench: Bench) -> None:
        for _ in range(3):
            bench.keeper.offer(hold(shard()))
        await bench.loading(shard())
        bench.keeper.offer(hold(shard(stage=1)))
        await bench.loading(shard(stage=1))

    assert sorted(run(journal, use)[:4]) == ["fetch m/1/0", "fetch m/1/1", "launch m/1/0", "launch m/1/1"]


def test_a_wiring_that_comes_before_the_worker_is_ready_waits_for_it(journal: Journal) -> None:
    async def use(bench: Bench) -> None:
        bench.keeper.offer(hold(shard()))
        bench.keeper.offer(wire(shard()))
        await bench.loading(shard())
        await bench.until(lambda: journal.all("wire", Wire))
        assert not bench.told

        bench.says(shard(), ShardState.READY)
        await bench.until(lambda: bench.told)
        assert {w.next_locators for w in bench.told} == {("tcp/1.1.1.1:1",)}

    run(journal, use)


def test_a_worker_that_dies_is_reported_until_its_shard_is_given_up(journal: Journal) -> None:
    async def use(bench: Bench) -> None:
        bench.keeper.offer(hold(shard()))
        await bench.loading(shard())
        bench.says(shard(), ShardState.WIRED)
        bench.workers[shard()].die("ended by SIGKILL")
        await bench.until(lambda: bench.report(shard()).state is ShardState.FAILED)

        bench.says(shard(), ShardState.WIRED)  # its last words were late
        report = bench.report(shard())
        assert (report.state, report.error_code, report.error) == (ShardState.FAILED, "shard_lost", "ended by SIGKILL")
        bench.keeper.offer(Retire(fencing_epoch=1, shard=shard()))
        await bench.until(lambda: not bench.keeper.reports())

    run(journal, use)


def test_a_worker_that_says_nothing_any_more_is_ended_and_its_shard_failed(journal: Journal) -> None:
    async def use(bench: Bench) -> None:
        for stage in (0, 1):
            bench.keeper.offer(hold(shard(stage)))
            await bench.loading(shard(stage))
        bench.says(shard(1), ShardState.READY)

        def silent_is_failed() -> bool:
            bench.says(shard(0), ShardState.WIRED)
            return bench.report(shard(1)).state is ShardState.FAILED

        await bench.until(silent_is_failed)
        await bench.until(lambda: "stopped" in bench.log)

        report = bench.report(shard(1))
        assert (report.error_code, "has said nothing" in report.error) == ("shard_lost", True)
        assert bench.report(shard(0)).state is ShardState.WIRED, "one that speaks goes on"

    run(journal, use, look_every_s=0.01)


def test_where_a_worker_listens_is_on_disk_until_its_shard_is_given_up(journal: Journal) -> None:
    async def use(bench: Bench) -> None:
        bench.keeper.offer(hold(shard()))
        await bench.loading(shard())
        assert kept_port(journal, shard()) == 0

        bench.says(shard(), ShardState.READY, locators=("tcp/192.168.1.2:4711", "tcp/[fe80::1]:4711"))
        await bench.until(lambda: kept_port(journal, shard()) == 4711)

        bench.keeper.offer(Retire(fencing_epoch=1, shard=shard()))
        await bench.until(lambda: not bench.keeper.reports())
        await bench.until(lambda: kept_port(journal, shard()) == 0)

    run(journal, use, look_every_s=0.2)


def test_a_worker_that_loads_is_given_more_time(journal: Journal) -> None:
    async def use(bench: Bench) -> None:
        bench.keeper.offer(hold(shard()))
        await bench.loading(shard())
        await anyio.sleep(0.4)  # 40 looks: four times what a loaded one has

        assert bench.report(shard()).state is ShardState.LOADING

    run(journal, use, look_every_s=0.01)


def test_a_fetch_that_fails_is_reported_with_its_reason_and_other_shards_go_on(journal: Journal) -> None:
    async def use(bench: Bench) -> None:
        for stage in (0, 1):
            bench.keeper.offer(hold(shard(stage)))
        await bench.until(lambda: [r.state for r in bench.keeper.reports()] == [ShardState.FAILED] * 2)
        assert {(r.error_code, r.error) for r in bench.keeper.reports()} == {("storage_full", "the disk is full")}

    run(journal, use, full=True)


def test_orders_of_an_older_lease_are_refused_also_after_a_restart(journal: Journal) -> None:
    async def first(bench: Bench) -> None:
        assert isinstance(bench.keeper.offer(Retire(fencing_epoch=5, shard=shard())), Accepted)
        assert isinstance(bench.keeper.offer(hold(shard(), fencing_epoch=4)), Refused)
        assert isinstance(bench.keeper.offer(Retire(fencing_epoch=5, shard=shard())), Accepted)
        assert bench.keeper.obey(6), "a lease that was only heard of counts as well"

    async def restarted(bench: Bench) -> None:
        refused = bench.keeper.offer(hold(shard(), fencing_epoch=5))
        assert isinstance(refused, Refused)
        assert (refused.code, refused.fencing_epoch) == ("stale_lease", 6)

    assert run(journal, first) == []
    assert run(journal, restarted) == []


def test_a_node_that_restarts_takes_its_shards_up_again_without_any_order(tmp_path: Path) -> None:
    async def before(bench: Bench) -> None:
        bench.keeper.offer(hold(shard()))
        bench.keeper.offer(wire(shard()))
        await bench.loading(shard())
        await bench.until(lambda: first.all("wire", Wire))

    async def after(bench: Bench) -> None:
        await bench.loading(shard())
        bench.says(shard(), ShardState.READY)
        assert [w.shard for w in bench.told] == [shard()]

    first = Journal(tmp_path / "journal.db")
    run(first, before)
    first.close()
    second = Journal(tmp_path / "journal.db")
    assert run(second, after)[:2] == ["fetch m/1/0", "launch m/1/0"]
    second.close()


def test_every_worker_is_ended_when_the_keeper_ends(journal: Journal) -> None:
    async def use(bench: Bench) -> None:
        for stage in (0, 1):
            bench.keeper.offer(hold(shard(stage)))
            await bench.loading(shard(stage))

    assert run(journal, use).count("stopped") == 2
