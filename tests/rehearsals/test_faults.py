"""Hundreds of fleets in which things go wrong, in virtual time: every answer is whole and the right one, and then all is well.

What goes wrong is drawn from a seed: a failure here is repeated by its number.  SHOAL_TEST_REHEARSALS=1000 plays so many.
"""

import os
import random
from collections.abc import Awaitable, Callable

import anyio
import pytest
from tests.rehearsals.conftest import CHAT, MACHINES, STAGES, Play, Site

from shoal.errors import NodeUnreachableError
from shoal.node.rehearse.fleet import FLEET
from shoal.node.stage_keys import stage_keys

SCENARIOS = int(os.environ.get("SHOAL_TEST_REHEARSALS", "100"))
OTHERS = ("b", "c", "d", "e")
MEND_S = 60.0
"""So soon after the last fault has ended the deployment answers again."""

Fault = Callable[[Site, random.Random], Awaitable[None]]


async def kill_worker(site: Site, dice: random.Random) -> None:
    worker = site.worker(dice.randrange(STAGES))
    if worker is not None:
        worker.kill()


async def freeze_worker(site: Site, dice: random.Random) -> None:
    """For a moment, or for so long that it is given up."""
    worker = site.worker(dice.randrange(STAGES))
    if worker is not None:
        worker.freeze()
        await anyio.sleep(dice.choice([0.3, 2.0, 12.0]))
        worker.thaw()


async def kill_node(site: Site, dice: random.Random) -> None:
    """With its workers, and come back."""
    name = dice.choice(OTHERS)
    if name in site.fleet.nodes:
        site.fleet.kill(name)
        await anyio.sleep(dice.choice([0.2, 1.5, 6.0, 15.0]))
        site.fleet.start(MACHINES[name])


async def cut_link(site: Site, dice: random.Random) -> None:
    one, other = dice.sample(sorted(MACHINES), 2)
    site.fleet.network.cut(one, other)
    await anyio.sleep(dice.choice([0.5, 3.0, 8.0]))
    site.fleet.network.heal(one, other)


async def cut_off(site: Site, dice: random.Random) -> None:
    """A node hears nobody, and nobody hears it."""
    name = dice.choice(OTHERS)
    for other in MACHINES:
        if other != name:
            site.fleet.network.cut(name, other)
    await anyio.sleep(dice.choice([0.5, 3.0, 8.0]))
    for other in MACHINES:
        if other != name:
            site.fleet.network.heal(name, other)


async def leave(site: Site, dice: random.Random) -> None:
    """A node goes as it should, and comes back."""
    name = dice.choice(OTHERS)
    if name in site.fleet.nodes and len(site.fleet.nodes) == len(MACHINES):
        await site.fleet.leave(name)
        await anyio.sleep(dice.choice([0.2, 5.0]))
        if name not in site.fleet.nodes:
            site.fleet.start(MACHINES[name])


async def garbage(site: Site, dice: random.Random) -> None:
    """A stranger dials a stage and says what is no frame."""
    worker = site.worker(dice.randrange(STAGES))
    if worker is not None and worker.loop is not None:
        try:
            way = site.fleet.network.dial("a", worker.locator, site.virtual.group(""))
        except NodeUnreachableError:
            return
        keys = stage_keys(FLEET, worker.spec.shard, STAGES)
        for _ in range(20):
            way.put(
                keys.tokens if worker.spec.shard.stage == 0 else keys.frames_in, dice.randbytes(dice.randrange(200))
            )
        way.close()


FAULTS: tuple[Fault, ...] = (kill_worker, freeze_worker, kill_node, cut_link, cut_off, leave, garbage)


@pytest.mark.parametrize("number", range(SCENARIOS))
def test_every_answer_is_whole_and_right_whatever_goes_wrong(
    play: Play, undisturbed: dict[int, list[int]], number: int
) -> None:
    dice = random.Random(number)

    async def scenario(site: Site) -> None:
        told: dict[int, list[int]] = {}

        async def ask(seed: int, after_s: float) -> None:
            await anyio.sleep(after_s)
            told[seed] = await site.answer(seed)

        async def happen(fault: Fault, after_s: float) -> None:
            await anyio.sleep(after_s)
            await fault(site, dice)

        async with anyio.create_task_group() as group:
            for seed in range(dice.randint(1, 4)):
                group.start_soon(ask, seed, dice.uniform(0, 2))
            for _ in range(dice.randint(1, 3)):
                group.start_soon(happen, dice.choice(FAULTS), dice.uniform(0, 8))

        assert told == {seed: undisturbed[seed] for seed in range(len(told))}
        await _is_well_again(site, undisturbed)

    play(scenario)


async def _is_well_again(site: Site, undisturbed: dict[int, list[int]]) -> None:
    """It answers, nothing runs for nobody, and no worker of an earlier plan is left."""
    with anyio.fail_after(MEND_S):
        await site.serves()
        assert await site.answer(7) == undisturbed[7]
        while (workers := site.fleet.workers_of(CHAT)) and len(workers) > STAGES:  # noqa: ASYNC110
            await anyio.sleep(0.5)
    await anyio.sleep(1.0)
    first = site.worker(0)
    assert first is not None
    assert first.loop is not None
    assert (first.loop.live_requests, first.loop.waiting_requests) == (0, 0)
    assert len({w.spec.shard.plan_epoch for w in workers}) == 1
