"""Two models that do not fit together, in a fleet in which things go wrong: each answers whom it is asked by, whole and right."""

import io
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import msgspec
import pytest
from tests.rehearsals.conftest import CHAT, MACHINES, Site
from tests.rehearsals.test_faults import MEND_S, OTHERS, Fault, cut_link, cut_off

from shoal.fleet.reconcile import Phase
from shoal.fleet.spec import DeploymentSpec
from shoal.ids import DeploymentId, Digest
from shoal.node.rehearse.fleet import Machine, RehearsedFleet
from shoal.node.rehearse.loop import rehearse
from shoal.node.rehearse.virtual import VirtualTime
from shoal.observe.log import set_up_logs
from shoal.plan.problem import RequestShape
from shoal.store.home import Store

SCENARIOS = int(os.environ.get("SHOAL_TEST_REHEARSALS", "40")) // 2
CODE = DeploymentId("code")
ONE_SHARD_BYTES = 150_000_000
"""A shard of the model takes two thirds of that, most of it the worker's own."""
STAGES = 2

Play = Callable[[Callable[[Site], Awaitable[None]]], float]


@pytest.fixture
def play(model: tuple[Store, Digest], tmp_path: Path) -> Play:
    """Run a scenario at a site whose nodes have room for one shard each, with two models; both begin on the same node."""

    def played(scenario: Callable[[Site], Awaitable[None]]) -> float:
        async def whole(virtual: VirtualTime) -> None:
            logged = io.StringIO()
            async with anyio.create_task_group() as group:
                fleet = RehearsedFleet(virtual, group, *model, tmp_path, set_up_logs(logged))
                for machine in MACHINES.values():
                    fleet.start(small(machine.name))
                await anyio.sleep(1.5)
                for name in (CHAT, CODE):
                    await fleet.deploy(spec(name, model[1]), at="e")
                while len(fleet.nodes["a"].models.served()) < 2:  # noqa: ASYNC110 - told to nobody in particular
                    await anyio.sleep(0.1)
                await scenario(Site(fleet, virtual, logged))
                await fleet.close()

        return rehearse(whole)

    return played


def small(name: str) -> Machine:
    return msgspec.structs.replace(MACHINES[name], memory_bytes=ONE_SHARD_BYTES)


def spec(name: DeploymentId, manifest: Digest) -> DeploymentSpec:
    shape = RequestShape(tokens_in=32, tokens_out=32, context_tokens=128, slots=3)
    return DeploymentSpec(
        deployment=name,
        model="it",
        manifest=manifest,
        source=MACHINES["a"].node,
        shape=shape,
        stages_exactly=STAGES,
        on_demand=True,
        keep_alive_s=4.0 if name == CHAT else None,
    )


def test_each_is_loaded_when_it_is_asked_for_and_no_node_ever_holds_two(
    play: Play, undisturbed: dict[int, list[int]]
) -> None:
    async def scenario(site: Site) -> None:
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                held = [sum(not w.why for w in node.workers.values()) for node in site.fleet.nodes.values()]
                most = max(most, *held)
                await anyio.sleep(0.01)

        async with anyio.create_task_group() as group:
            group.start_soon(watch)
            assert sum(len(node.workers) for node in site.fleet.nodes.values()) == 0
            for seed, name in enumerate((CHAT, CODE, CODE, CHAT, CODE)):
                assert await site.answer(seed, name) == undisturbed[seed]
            assert most == 1

            assert await site.answer(5, CHAT) == undisturbed[5]
            await anyio.sleep(8.0)
            assert phase_of(site, CHAT) is Phase.ASLEEP, "nobody has asked for longer than it was to stay"
            assert site.fleet.workers_of(CHAT) == []
            assert await site.answer(6, CODE) == undisturbed[6]
            await anyio.sleep(30.0)
            assert phase_of(site, CODE) is Phase.SERVING, "nobody needs its memory"
            group.cancel_scope.cancel()

    play(scenario)


async def kill_small_node(site: Site, dice: random.Random) -> None:
    """With its workers, and come back as small as it was."""
    name = dice.choice(OTHERS)
    if name in site.fleet.nodes:
        site.fleet.kill(name)
        await anyio.sleep(dice.choice([0.2, 1.5, 6.0, 15.0]))
        site.fleet.start(small(name))


async def kill_some_worker(site: Site, dice: random.Random) -> None:
    workers = site.fleet.workers_of(dice.choice([CHAT, CODE]))
    if workers:
        dice.choice(workers).kill()


FAULTS: tuple[Fault, ...] = (kill_small_node, kill_some_worker, cut_link, cut_off)


@pytest.mark.parametrize("number", range(SCENARIOS))
def test_every_answer_of_both_is_whole_and_right_whatever_goes_wrong(
    play: Play, undisturbed: dict[int, list[int]], number: int
) -> None:
    dice = random.Random(number)

    async def scenario(site: Site) -> None:
        told: dict[tuple[DeploymentId, int], list[int]] = {}

        async def ask(name: DeploymentId, seed: int, after_s: float) -> None:
            await anyio.sleep(after_s)
            told[name, seed] = await site.answer(seed, name)

        async def happen(fault: Fault, after_s: float) -> None:
            await anyio.sleep(after_s)
            await fault(site, dice)

        async with anyio.create_task_group() as group:
            for seed in range(dice.randint(2, 5)):
                group.start_soon(ask, dice.choice([CHAT, CODE]), seed, dice.uniform(0, 10))
            for _ in range(dice.randint(1, 3)):
                group.start_soon(happen, dice.choice(FAULTS), dice.uniform(0, 12))

        assert {seed: tokens for (_, seed), tokens in told.items()} == {n: undisturbed[n] for n in range(len(told))}
        with anyio.fail_after(2 * MEND_S):
            for name in (CHAT, CODE):
                assert await site.answer(7, name) == undisturbed[7]

    play(scenario)


def phase_of(site: Site, name: DeploymentId) -> Phase:
    view = site.fleet.nodes["a"].models.view
    status = view.find(name) if view is not None else None
    assert status is not None
    return status.phase
