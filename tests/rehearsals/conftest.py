"""A fleet of five in virtual time, its model, and what its answers are when nothing goes wrong."""

import io
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import msgspec
import pytest

from shoal.errors import ShardLostError, UnavailableError
from shoal.fleet.spec import DeploymentSpec
from shoal.ids import DeploymentId, Digest, RequestId
from shoal.node.importing import import_files
from shoal.node.progress import Quiet
from shoal.node.pull import PullRequest, pull
from shoal.node.rehearse.fleet import Machine, RehearsedFleet
from shoal.node.rehearse.loop import rehearse
from shoal.node.rehearse.process import RehearsedWorker
from shoal.node.rehearse.virtual import VirtualTime
from shoal.observe.log import set_up_logs
from shoal.plan.problem import RequestShape
from shoal.runtime.request import FinishReason, GenerateRequest, SamplingParams
from shoal.store.home import Store, open_store

CHAT = DeploymentId("chat")
MACHINES = {
    m.name: m
    for m in (
        Machine(name="a"),
        Machine(name="b"),
        Machine(name="c"),
        Machine(name="d", coordinates=True, eager=False),
        Machine(name="e", coordinates=True),
    )
}
"""The gateway is on the first, the coordinator on the last, its standby before it."""
STAGES = 3
TOKENS = 40


def asked(seed: int) -> GenerateRequest:
    """An answer of its own for each *seed*, the same each time."""
    return GenerateRequest(
        request=RequestId(f"r{seed}"),
        deployment=CHAT,
        prompt=tuple((seed * 7 + 5 * i) % 61 + 3 for i in range(12 + seed % 9)),
        max_tokens=TOKENS,
        ignore_eos=True,
        sampling=SamplingParams(temperature=1.0, seed=seed),
        reproducible=True,
    )


@dataclass
class Site:
    """A fleet at work."""

    fleet: RehearsedFleet
    virtual: VirtualTime
    logged: io.StringIO

    async def answer(self, seed: int, name: DeploymentId = CHAT) -> list[int]:
        """The tokens of an answer, whole; who is refused at the door comes again."""
        request = msgspec.structs.replace(asked(seed), deployment=name, request=RequestId(f"{name}-{seed}"))
        while True:
            tokens: list[int] = []
            finish: FinishReason | None = None
            try:
                async for delta in self.fleet.generate(request, at="a"):
                    assert finish is None
                    tokens += [token.token for token in delta.tokens]
                    finish = delta.finish
            except UnavailableError as error:
                if tokens or isinstance(error, ShardLostError):
                    raise
                await anyio.sleep(error.retry_after_s or 1.0)
            else:
                assert finish is FinishReason.LENGTH
                return tokens

    async def serves(self) -> None:
        """Wait until the deployment takes requests."""
        while not self.fleet.nodes["a"].models.answers(CHAT):  # noqa: ASYNC110 - told to nobody in particular
            await anyio.sleep(0.1)

    def worker(self, stage: int) -> RehearsedWorker | None:
        """The newest of a stage; None while there is none."""
        found = [w for w in self.fleet.workers_of(CHAT) if w.spec.shard.stage == stage]
        return max(found, key=lambda w: (w.spec.shard.plan_epoch, w.spec.attempt), default=None)


Play = Callable[[Callable[[Site], Awaitable[None]]], float]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, golden: Path) -> tuple[Store, Digest]:
    store = open_store(tmp_path_factory.mktemp("home"))
    pull(store, PullRequest(reference=str(golden / "llama"), name="it"), import_files, Quiet())
    return store, store.library.digest("it")


@pytest.fixture
def play(model: tuple[Store, Digest], tmp_path: Path) -> Play:
    """Run a scenario at a site where the model serves; the virtual seconds that it took."""
    return lambda scenario: rehearse(lambda virtual: _at_site(virtual, model, tmp_path, scenario))


async def _at_site(
    virtual: VirtualTime, model: tuple[Store, Digest], folder: Path, scenario: Callable[[Site], Awaitable[None]]
) -> None:
    async with site(virtual, model, folder) as made:
        await scenario(made)


@asynccontextmanager
async def site(virtual: VirtualTime, model: tuple[Store, Digest], folder: Path) -> AsyncIterator[Site]:
    """Five nodes, three of which serve."""
    store, digest = model
    logged = io.StringIO()
    async with anyio.create_task_group() as group:
        fleet = RehearsedFleet(virtual, group, store, digest, folder, set_up_logs(logged))
        for machine in MACHINES.values():
            fleet.start(machine)
        await anyio.sleep(1.5)
        shape = RequestShape(tokens_in=32, tokens_out=32, context_tokens=128, slots=3)
        spec = DeploymentSpec(
            deployment=CHAT, model="it", manifest=digest, source=MACHINES["a"].node, shape=shape, stages_exactly=STAGES
        )
        await fleet.deploy(spec, at="e")
        made = Site(fleet, virtual, logged)
        await made.serves()
        yield made
        await fleet.close()


@pytest.fixture(scope="session")
def undisturbed(model: tuple[Store, Digest], tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[int]]:
    """Answers by seed where nothing goes wrong."""
    answers: dict[int, list[int]] = {}

    async def scenario(virtual: VirtualTime) -> None:
        async with site(virtual, model, tmp_path_factory.mktemp("undisturbed")) as made:
            for seed in range(8):
                answers[seed] = await made.answer(seed)

    rehearse(scenario)
    return answers
