"""What a node does with its shards: orders in, workers and reports out."""

import io
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest

from shoal.fleet.order import Hold
from shoal.fleet.report import ShardId, ShardState
from shoal.ids import DeploymentId, Digest
from shoal.node.holding import complete_manifests
from shoal.node.journal import Journal
from shoal.node.shards import ShardKeeper, WorkerHandle
from shoal.observe.log import set_up_logs
from shoal.store.home import open_store


def hold(plan_epoch: int = 1, deployment: str = "chat") -> Hold:
    return Hold(
        fencing_epoch=1, shard=ShardId(deployment=DeploymentId(deployment), plan_epoch=plan_epoch, stage=0), stages=1,
        manifest=Digest("0" * 64), start=0, stop=1, slots=1, context_tokens=16, in_flight=1, memory_bytes=10, sources=(),
    )  # fmt: skip


@dataclass
class Machine:
    """Workers that say when they are started and ended, and end only when they are let go."""

    said: list[str] = field(default_factory=list)
    may_end: anyio.Event = field(default_factory=anyio.Event)
    ails: Exception | None = None

    async def fetch(self, order: Hold, _: Callable[[int], None]) -> None:
        if self.ails is not None:
            raise self.ails

    async def launch(self, order: Hold, _birth: int) -> WorkerHandle:
        self.said.append(f"start {order.shard}")
        return Worker(self, str(order.shard))


@dataclass
class Worker:
    machine: Machine
    shard: str

    async def wait(self) -> str:
        await anyio.sleep_forever()
        raise AssertionError

    async def stop(self, *, at_once: bool = False) -> None:
        await self.machine.may_end.wait()
        self.machine.said.append(f"ended {self.shard}")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal(tmp_path / "journal.db")
    yield opened
    opened.close()


@asynccontextmanager
async def keeping(journal: Journal, machine: Machine) -> AsyncIterator[ShardKeeper]:
    log = set_up_logs(io.StringIO())
    keeper = ShardKeeper(journal, machine.fetch, machine.launch, lambda _: None, lambda: None, log)
    async with anyio.create_task_group() as group:
        group.start_soon(keeper.run)
        yield keeper
        machine.may_end.set()
        group.cancel_scope.cancel()


async def until(true: Callable[[], object]) -> None:
    with anyio.fail_after(10):
        while not true():  # noqa: ASYNC110 - looked at from outside
            await anyio.sleep(0.005)


pytestmark = pytest.mark.anyio


async def test_the_shard_of_a_new_plan_is_loaded_only_when_the_memory_of_the_old_one_is_back(journal: Journal) -> None:
    machine = Machine()
    async with keeping(journal, machine) as keeper:
        keeper.offer(hold(1))
        keeper.offer(hold(1, "another"))
        await until(lambda: len(machine.said) == 2)

        keeper.offer(hold(2))
        await anyio.sleep(0.1)
        assert sorted(machine.said) == ["start another/1/0", "start chat/1/0"]
        machine.may_end.set()
        await until(lambda: len(machine.said) == 4)

        assert machine.said[2:] == ["ended chat/1/0", "start chat/2/0"]
        assert {str(r.shard) for r in keeper.reports()} == {"another/1/0", "chat/2/0"}
        assert {str(h.shard) for h in journal.all("hold", Hold)} == {"another/1/0", "chat/2/0"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), anyio.BrokenResourceError(), KeyError("x")])
async def test_whatever_ails_a_shard_the_others_go_on(journal: Journal, error: Exception) -> None:
    machine = Machine()
    async with keeping(journal, machine) as keeper:
        keeper.offer(hold(1, "sound"))
        await until(lambda: machine.said)
        machine.ails = error
        keeper.offer(hold(1, "ailing"))
        await until(lambda: any(r.state is ShardState.FAILED for r in keeper.reports()))

        states = {r.shard.deployment: (r.state, r.error) for r in keeper.reports()}
        assert states["sound"] == (ShardState.LOADING, "")
        assert type(error).__name__ in states["ailing"][1]


def test_a_damaged_manifest_does_not_hide_the_other_models(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    (tmp_path / "models").mkdir(exist_ok=True)
    (tmp_path / "models" / "broken.json").write_bytes(b"garbage")

    assert complete_manifests(store) == ()
