"""Relays of one plan share a process on their node: the planner counts one."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import anyio

from shoal.fleet.report import ShardId
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.node.crews import Crews
from shoal.node.worker_spec import WorkerSpec


def spec(stage: int, plan_epoch: int = 1, deployment: str = "m") -> WorkerSpec:
    shard = ShardId(deployment=DeploymentId(deployment), plan_epoch=plan_epoch, stage=stage)
    return WorkerSpec(
        fleet="f", node=NodeId("n" * 32), home="", agent_locator="", data_listen="", shard=shard, stages=5,
        manifest=Digest("d"), start=2, stop=2, slots=1, context_tokens=16, in_flight=1, threads=1,
    )  # fmt: skip


@dataclass
class Process:
    """A process that relays for what it is told."""

    told: list[ShardId]
    over: anyio.Event = field(default_factory=anyio.Event)
    why: str = "stopped"

    @property
    def ended(self) -> bool:
        return self.over.is_set()

    async def tell(self, spec: WorkerSpec) -> None:
        self.told.append(spec.shard)

    async def wait(self) -> str:
        await self.over.wait()
        return self.why

    async def stop(self) -> None:
        self.over.set()

    def die(self, why: str) -> None:
        self.why = why
        self.over.set()


def run(use: Callable[[Crews, list[Process]], Awaitable[None]]) -> None:
    started: list[Process] = []

    async def start(first: WorkerSpec) -> Process:
        await anyio.sleep(0.01)  # starting takes a while: others come meanwhile
        started.append(Process([first.shard]))
        return started[-1]

    async def scenario() -> None:
        with anyio.fail_after(10):
            await use(Crews(start), started)

    anyio.run(scenario)


def test_relays_of_one_plan_that_come_at_once_share_a_process_and_others_have_their_own() -> None:
    async def use(crews: Crews, started: list[Process]) -> None:
        async with anyio.create_task_group() as group:
            for wanted in (spec(1), spec(3), spec(1, plan_epoch=2), spec(1, deployment="other")):
                group.start_soon(crews.begin, wanted)

        found = {frozenset(process.told) for process in started}
        assert found == {
            frozenset({spec(1).shard, spec(3).shard}),
            frozenset({spec(1, plan_epoch=2).shard}),
            frozenset({spec(1, deployment="other").shard}),
        }

    run(use)


def test_the_process_ends_with_its_last_relay() -> None:
    async def use(crews: Crews, started: list[Process]) -> None:
        one, three = await crews.begin(spec(1)), await crews.begin(spec(3))

        await one.stop()
        assert not started[0].ended
        await one.stop()
        assert not started[0].ended, "stopping twice is harmless"
        await three.stop()
        assert started[0].ended
        assert await three.wait() == "stopped"

    run(use)


def test_a_process_that_dies_is_the_end_of_all_its_relays() -> None:
    async def use(crews: Crews, started: list[Process]) -> None:
        relays = [await crews.begin(spec(1)), await crews.begin(spec(3))]

        started[0].die("worker 7 was ended by SIGKILL")

        assert {await relay.wait() for relay in relays} == {"worker 7 was ended by SIGKILL"}

    run(use)


def test_a_relay_that_comes_after_a_death_or_a_farewell_gets_a_process_that_serves_it() -> None:
    async def use(crews: Crews, started: list[Process]) -> None:
        await crews.begin(spec(1))
        started[0].die("gone")
        again, other = await crews.begin(spec(1)), await crews.begin(spec(3))
        await again.stop()
        late = await crews.begin(spec(1))

        assert [process.told for process in started] == [
            [spec(1).shard],
            [spec(1).shard, spec(3).shard],
            [spec(1).shard],
        ]
        assert [process.ended for process in started] == [True, False, False]
        await other.stop()
        assert [process.ended for process in started] == [True, True, False]
        await late.stop()
        assert started[2].ended

    run(use)
