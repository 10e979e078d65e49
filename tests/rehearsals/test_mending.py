"""What a plan has lost is given to another worker, and all other stages stay as they are: in virtual time."""

import anyio
from tests.rehearsals.conftest import CHAT, MACHINES, STAGES, Play, Site

from shoal.fleet.view import DeploymentStatus
from shoal.plan.problem import Plan


def status(site: Site) -> DeploymentStatus:
    view = site.fleet.nodes["a"].models.view
    found = view.find(CHAT) if view is not None else None
    assert found is not None
    return found


def births(site: Site) -> list[int]:
    """Of the worker of each stage."""
    found = [site.worker(stage) for stage in range(STAGES)]
    return [worker.spec.birth if worker is not None else 0 for worker in found]


def host(site: Site, stage: int) -> str:
    worker = site.worker(stage)
    assert worker is not None
    return worker.host


async def mended(site: Site, times: int) -> None:
    with anyio.fail_after(30):
        while status(site).deployment.mends < times or not site.fleet.nodes["a"].models.answers(CHAT):  # noqa: ASYNC110
            await anyio.sleep(0.1)


def test_a_worker_that_ends_is_started_again_where_it_was_and_the_others_stay(
    play: Play, undisturbed: dict[int, list[int]]
) -> None:
    async def scenario(site: Site) -> None:
        for stage in range(STAGES):
            before, epoch, mends = births(site), status(site).deployment.plan_epoch, status(site).deployment.mends
            async with anyio.create_task_group() as group:

                async def ask() -> None:
                    assert await site.answer(1) == undisturbed[1]

                group.start_soon(ask)
                await anyio.sleep(1.0)
                worker = site.worker(stage)
                assert worker is not None
                worker.kill()
            await mended(site, mends + 1)

            after = births(site)
            assert [i for i in range(STAGES) if before[i] != after[i]] == [stage]
            assert status(site).deployment.plan_epoch == epoch

    play(scenario)


def test_the_stage_of_a_lost_node_goes_to_another_and_the_others_stay(
    play: Play, undisturbed: dict[int, list[int]]
) -> None:
    async def scenario(site: Site) -> None:
        before, lost = births(site), host(site, 1)
        async with anyio.create_task_group() as group:

            async def ask() -> None:
                assert await site.answer(2) == undisturbed[2]

            group.start_soon(ask)
            await anyio.sleep(1.0)
            site.fleet.kill(lost)
        await mended(site, 1)

        after, plan = births(site), status(site).deployment.answer
        assert [i for i in range(STAGES) if before[i] != after[i]] == [1]
        assert host(site, 1) != lost
        assert isinstance(plan, Plan)
        assert MACHINES[host(site, 1)].node == plan.stages[1].node
        assert f"stage 1 goes to {plan.stages[1].node}" in status(site).deployment.mended

    play(scenario)


def test_two_stages_that_are_lost_at_once_both_go_elsewhere(play: Play, undisturbed: dict[int, list[int]]) -> None:
    async def scenario(site: Site) -> None:
        before, lost = births(site), {host(site, 1), host(site, 2)}
        for name in lost - {"e"}:  # the coordinator stays: whoever takes over for it may think anew
            site.fleet.kill(name)
        await mended(site, 1)

        assert births(site)[0] == before[0]
        assert not {host(site, 1), host(site, 2)} & (lost - {"e"})
        assert await site.answer(3) == undisturbed[3]

    play(scenario)


def test_a_node_that_loses_a_stage_again_and_again_does_not_keep_it(play: Play) -> None:
    async def scenario(site: Site) -> None:
        unlucky = host(site, 2)
        for times in range(1, 5):
            worker = site.worker(2)
            assert worker is not None
            assert worker.host == unlucky
            worker.kill()
            await mended(site, times)

        assert host(site, 2) != unlucky

    play(scenario)


def test_a_stage_whose_numbers_are_broken_is_replaced_and_the_answers_go_on(
    play: Play, undisturbed: dict[int, list[int]]
) -> None:
    async def scenario(site: Site) -> None:
        before = births(site)
        async with anyio.create_task_group() as group:

            async def ask(seed: int) -> None:
                assert await site.answer(seed) == undisturbed[seed]

            group.start_soon(ask, 1)
            group.start_soon(ask, 2)
            await anyio.sleep(1.0)
            broken = site.worker(1)
            assert broken is not None
            broken.spoils = True
        await mended(site, 1)

        assert [i for i in range(STAGES) if before[i] != births(site)[i]] == [1]
        assert "numbers that are not finite" in status(site).deployment.mended

    play(scenario)


def test_where_nobody_can_take_a_stage_the_answer_waits_for_its_node(
    play: Play, undisturbed: dict[int, list[int]]
) -> None:
    async def scenario(site: Site) -> None:
        idle = set(MACHINES) - {host(site, stage) for stage in range(STAGES)} - {"e"}
        for name in idle:
            site.fleet.kill(name)
        lost = next(host(site, stage) for stage in (1, 2) if host(site, stage) != "e")
        async with anyio.create_task_group() as group:

            async def ask() -> None:
                assert await site.answer(4) == undisturbed[4]

            group.start_soon(ask)
            await anyio.sleep(1.0)
            site.fleet.kill(lost)
            await anyio.sleep(15.0)
            site.fleet.start(MACHINES[lost])

    play(scenario)
