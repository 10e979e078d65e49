"""A coordinator weighs plans while it serves: devices slow down and recover, and what is deployed goes where it is better off."""

from pathlib import Path

import msgspec
import pytest
from tests.node.test_coordinator import CHAT, FACTS, SPEC, A, B, C, Nodes, Office, run

from shoal.clock import ManualClock
from shoal.fleet.reconcile import Phase
from shoal.fleet.report import ShardState
from shoal.fleet.view import CoordinatorView
from shoal.ids import NodeId
from shoal.node.journal import Journal
from shoal.node.last_plan import remember
from shoal.plan.budget import StepBudget
from shoal.plan.placement import place
from shoal.plan.problem import Answer, BlockSpec, DeviceSpec, LinkSpec, Plan, Problem, RequestShape
from shoal.plan.replan import Rules

ROOM = 100
EACH = 10
SHAPE = RequestShape(tokens_in=1, tokens_out=10, context_tokens=11, slots=1)


class Site:
    """Three devices: the source holds the first of three equal blocks, and needs another for the rest."""

    def __init__(self) -> None:
        self.pace_s = {A: 0.1, B: 0.1, C: 0.2}
        facts = msgspec.structs.replace(FACTS, memory_budget_bytes=ROOM)
        self.nodes = Nodes(ManualClock(100), alive={A, B, C}, facts=facts, answer=self.answer, problem=self.problem)
        self.planned = 0

    def problem(self, usable: list[NodeId]) -> Problem:
        nodes = sorted(usable)
        return Problem(
            blocks=tuple(BlockSpec(name=str(i), weights_bytes=EACH) for i in range(3)),
            devices=tuple(
                DeviceSpec(
                    node=n, memory_budget_bytes=2 * EACH if n != A else EACH, decode_s=(self.pace_s[n],) * 3,
                    prefill_s=(self.pace_s[n],) * 3,
                )
                for n in nodes
            ),
            links=tuple(
                LinkSpec(source=a, target=b, latency_s=0.001, bytes_per_s=1e6) for a in nodes for b in nodes if a != b
            ),
            shape=SHAPE,
            source=A,
        )  # fmt: skip

    def answer(self, usable: list[NodeId]) -> Answer:
        self.planned += 1
        return place(self.problem(usable), StepBudget(10**6))


async def serving(office: Office, on: NodeId) -> None:
    await office.leads()
    office.coordinator.moving.weighing.rules = Rules(dwell_s=10.0)
    await office.coordinator.want(SPEC)
    await office.until(Phase.SERVING, A, on)


def shard_epochs(nodes: Nodes) -> dict[NodeId, set[int]]:
    return {n: {s.plan_epoch for s in mine} for n, mine in nodes.shards.items() if mine}


def phases_since(office: Office, count: int) -> set[Phase]:
    return {status.phase for view in office.said[count:] for status in view.deployments}


@pytest.mark.parametrize(("tight", "seen"), [(False, {Phase.SERVING}), (True, {Phase.SERVING, Phase.MOVING})])
def test_when_a_device_slows_down_the_deployment_moves_once_and_says_why(
    tight: bool, seen: set[Phase], journal: Journal
) -> None:
    site = Site()

    async def use(office: Office) -> None:
        if tight:
            no_room_for_two(site)
        await serving(office, B)
        site.nodes.live = 1
        await office.pass_s(12)
        count = len(office.said)
        assert "plan.moving" not in office.noted, "nothing is better than what serves"

        site.pace_s[B] = 0.6
        await office.see(lambda: "plan.moving" in office.noted)
        site.nodes.live = 0  # the answers under way end
        await office.until(Phase.SERVING, A, C)
        await office.see(lambda: shard_epochs(site.nodes) == {A: {2}, C: {2}})

        moved = office.said[-1].find(CHAT).deployment
        assert moved.moved.startswith("1302 -> 502 ms per token, move costs ")
        assert office.noted.count("plan.moved") == 1
        assert office.coordinator.moving.counts == {(CHAT, "made"): 1}
        assert phases_since(office, count) == seen

    run(journal, use, nodes=site.nodes)


def no_room_for_two(site: Site) -> None:
    """Every node has room for what it may be given by one plan, and no more."""
    reports = site.nodes.reports

    def tight() -> list[object]:
        return [
            msgspec.structs.replace(
                r, facts=msgspec.structs.replace(r.facts, memory_budget_bytes=EACH if r.node == A else 2 * EACH)
            )
            for r in reports()
        ]

    site.nodes.reports = tight


def test_when_it_recovers_it_moves_back_at_most_once_and_rests(journal: Journal) -> None:
    site = Site()

    async def use(office: Office) -> None:
        await serving(office, B)
        site.nodes.live = 1
        for pace_s in (0.6, 0.1, 0.6, 0.1, 0.1, 0.1):
            site.pace_s[B] = pace_s
            site.nodes.live = 0
            await office.pass_s(2)
            site.nodes.live = 1
            await office.pass_s(4)
        site.nodes.live = 0
        await office.until(Phase.SERVING, A, B)

        made = office.noted.count("plan.moved")
        assert made <= 36 / 10 + 1, "no more than the dwell time allows"
        await office.pass_s(60)
        assert office.noted.count("plan.moved") == made

    run(journal, use, nodes=site.nodes)


def test_noise_moves_nothing_and_does_not_wake_the_planner(journal: Journal) -> None:
    site = Site()

    async def use(office: Office) -> None:
        await serving(office, B)
        site.nodes.live = 3
        await office.pass_s(6)
        planned = site.planned
        for step in range(20):
            site.pace_s[B] = 0.1 * (1 + 0.04 * (-1) ** step)
            await office.pass_s(2)

        assert "plan.moving" not in office.noted
        assert site.planned <= planned + 1

    run(journal, use, nodes=site.nodes)


def test_a_move_whose_target_is_lost_is_dropped_and_the_plan_serves_on(journal: Journal) -> None:
    site = Site()

    async def use(office: Office) -> None:
        await serving(office, B)
        site.nodes.live = 1
        obey = site.nodes.obey

        async def slow_c(addressed: object) -> object:
            reply = await obey(addressed)
            for shard, report in site.nodes.shards.get(C, {}).items():
                site.nodes.shards[C][shard] = msgspec.structs.replace(report, state=ShardState.LOADING, locators=())
            return reply

        office.coordinator.send_order = slow_c
        await office.pass_s(10)
        site.pace_s[B] = 0.6
        await office.see(lambda: "plan.moving" in office.noted)
        count = len(office.said)
        site.nodes.alive = {A, B}
        await office.see(lambda: "plan.stays" in office.noted)
        await office.pass_s(2)

        assert phases_since(office, count) == {Phase.SERVING}
        assert office.coordinator.moving.counts == {(CHAT, "dropped"): 1}
        assert shard_epochs(site.nodes)[A] == {1}

    run(journal, use, nodes=site.nodes)


def test_when_a_device_is_lost_the_plan_that_was_made_for_it_is_in_force_at_once(journal: Journal) -> None:
    site = Site()

    async def use(office: Office) -> None:
        await serving(office, B)
        await prepared(office)
        site.nodes.alive = {A, C}
        await office.until(Phase.SERVING, A, C)

        made = [text for kind, text in zip(office.noted, office.texts, strict=True) if kind == "plan.mended"]
        assert len(made) == 1
        assert made[0].endswith(", as planned before the loss")

    run(journal, use, nodes=site.nodes)


async def prepared(office: Office) -> None:
    watched = office.coordinator.moving.weighing._watched
    await office.see(lambda: CHAT in watched and watched[CHAT].prepared is not None)


@pytest.mark.parametrize("why", ["others took the memory", "that node is away too", "a problem that is new"])
def test_a_prepared_plan_that_no_longer_holds_is_not_used(why: str, journal: Journal) -> None:
    site = Site()

    async def use(office: Office) -> None:
        await serving(office, B)
        await prepared(office)
        weighing = office.coordinator.moving.weighing
        match why:
            case "others took the memory":
                site.nodes.facts = msgspec.structs.replace(FACTS, memory_budget_bytes=EACH)
            case "that node is away too":
                site.nodes.alive -= {C}
            case _:
                site.pace_s[C] = 0.9
                await office.see(lambda: weighing._watched[CHAT].prepared is not None)
                weighing._watched[CHAT].prepared = None
        site.nodes.alive -= {B}
        await office.see(lambda: "node.lost" in office.noted)

        assert weighing.ready(office.coordinator.state.deployments[CHAT]) is None

    run(journal, use, nodes=site.nodes)


def test_a_standby_that_takes_over_in_the_middle_of_a_move_ends_it(tmp_path: Path, journal: Journal) -> None:
    site = Site()
    heard: list[CoordinatorView] = []

    async def leader(office: Office) -> None:
        await serving(office, B)
        site.nodes.live = 1
        await office.pass_s(10)
        site.pace_s[B] = 0.6
        await office.see(lambda: office.said[-1].find(CHAT).deployment.plan_epoch == 2)
        heard.append(office.said[-1])
        assert heard[0].find(CHAT).deployment.former is not None, "answers of the old plan are under way"

    async def standby(office: Office) -> None:
        await office.pass_s(1)
        assert shard_epochs(site.nodes)[B] == {1}
        site.nodes.live = 0
        await office.see(lambda: shard_epochs(site.nodes) == {A: {2}, C: {2}})
        await office.see(lambda: office.said[-1].find(CHAT).deployment.former is None)

    run(journal, leader, nodes=site.nodes)
    other = Journal(tmp_path / "other.db")
    remember(other, heard[0])
    run(other, standby, eager=False, nodes=site.nodes, me=B)
    other.close()


def test_a_deployment_that_is_dropped_or_declared_anew_in_the_middle_of_a_move_leaves_nothing_behind(
    journal: Journal,
) -> None:
    site = Site()

    async def use(office: Office) -> None:
        await serving(office, B)
        site.nodes.live = 1
        await office.pass_s(10)
        site.pace_s[B] = 0.6
        await office.see(lambda: "plan.moving" in office.noted)
        await office.coordinator.drop(CHAT)

        await office.see(lambda: not shard_epochs(site.nodes))
        await office.coordinator.want(SPEC)
        await office.until(Phase.SERVING, A, C)
        deployment = office.said[-1].find(CHAT).deployment
        assert isinstance(deployment.answer, Plan)
        assert deployment.plan_epoch > 2
        assert (deployment.moved, deployment.successor, deployment.former) == ("", None, None)

    run(journal, use, nodes=site.nodes)
