"""Who coordinates: leases that are lost, taken over and found again, and what a coordinator knows after it was away."""

from pathlib import Path

from tests.node.test_coordinator import CHAT, SPEC, A, B, Nodes, Office, run

from shoal.clock import ManualClock
from shoal.fleet.reconcile import Phase
from shoal.fleet.view import CoordinatorView, Lease
from shoal.ids import NodeId
from shoal.node.journal import Journal
from shoal.node.last_plan import remember


def view_of(holder: NodeId, fencing_epoch: int, *statuses: object) -> CoordinatorView:
    return CoordinatorView(
        lease=Lease(holder=holder, fencing_epoch=fencing_epoch), sequence=1, deployments=tuple(statuses)
    )


def test_whoever_hears_a_greater_lease_steps_down_and_of_two_equal_ones_one_goes_on(journal: Journal) -> None:
    async def use(office: Office) -> None:
        await office.leads()
        mine = office.coordinator.lease
        assert mine is not None

        office.coordinator.hear_view(view_of(NodeId("0" * 32), mine.fencing_epoch))
        assert office.coordinator.lease == mine, "the greater name counts, and it is ours"

        office.coordinator.hear_view(view_of(B, mine.fencing_epoch))
        assert office.coordinator.lease is None
        assert office.noted[-1] == "coordinator.stepped_down"

    run(journal, use)


def test_an_order_that_is_refused_for_a_newer_lease_ends_ours_and_our_next_is_above_it(journal: Journal) -> None:
    async def use(office: Office) -> None:
        await office.leads()
        office.nodes.fence = 50
        await office.coordinator.want(SPEC)
        await office.see(lambda: "coordinator.fenced" in office.noted)
        assert not any(office.nodes.shards.values())

        await office.see(lambda: office.noted.count("coordinator.leads") == 2)
        assert office.coordinator.lease == Lease(holder=A, fencing_epoch=51)

    run(journal, use)


def test_a_standby_takes_over_what_was_wanted_and_plans_anew_only_when_it_must(
    tmp_path: Path, journal: Journal
) -> None:
    heard: list[CoordinatorView] = []
    nodes = Nodes(ManualClock(100))

    async def leader(office: Office) -> None:
        await office.leads()
        await office.coordinator.want(SPEC)
        await office.until(Phase.SERVING)
        await office.coordinator.drop(CHAT)
        await office.coordinator.want(SPEC)
        await office.until(Phase.SERVING)
        heard.append(office.said[-1])

    async def standby(office: Office) -> None:
        office.coordinator.hear_view(heard[0])
        before = len(nodes.orders)
        await office.until(Phase.SERVING)
        last = heard[0].find(CHAT).deployment
        assert office.coordinator.lease.fencing_epoch > heard[0].lease.fencing_epoch
        assert office.said[-1].find(CHAT).deployment == last, "what works is not planned again"
        assert nodes.orders[before:] == []

        nodes.alive = {B}
        await office.until(Phase.SERVING, B)
        assert office.said[-1].find(CHAT).deployment.plan_epoch > last.plan_epoch > 1

    run(journal, leader, nodes=nodes)
    other = Journal(tmp_path / "other.db")
    run(other, standby, eager=False, nodes=nodes, me=B)
    other.close()


def test_a_coordinator_that_was_replaced_while_it_was_away_forgets_what_it_wanted(journal: Journal) -> None:
    nodes = Nodes(ManualClock(100), coordinating=frozenset({A, B}))

    async def before(office: Office) -> None:
        await office.leads()
        await office.coordinator.want(SPEC)
        await office.until(Phase.SERVING)

    async def after(office: Office) -> None:
        await office.pass_s(1.0)
        assert office.coordinator.lease is None, "another may have taken over: it listens first"
        office.coordinator.hear_view(view_of(B, 2))
        await office.leads()
        assert office.coordinator.lease.fencing_epoch > 2
        assert office.said[-1].deployments == ()

    run(journal, before, nodes=nodes)
    run(journal, after, nodes=nodes)


def test_a_coordinator_that_restarts_alone_waits_for_its_nodes_before_it_says_or_plans_anything(
    journal: Journal,
) -> None:
    nodes = Nodes(ManualClock(100))

    async def before(office: Office) -> None:
        await office.leads()
        await office.coordinator.want(SPEC)
        await office.until(Phase.SERVING)

    async def after(office: Office) -> None:
        while not office.coordinator.leading:
            await office.pass_s(0.01, quiet=True)
        await office.pass_s(1.0, quiet=True)
        assert office.said == []
        await office.until(Phase.SERVING)
        assert office.said[-1].find(CHAT).deployment.plan_epoch == 1

    run(journal, before, nodes=nodes)
    count = len(nodes.orders)
    run(journal, after, nodes=nodes)
    assert nodes.orders[count:] == []


def test_it_does_not_wait_for_ever_for_a_node_that_is_gone(journal: Journal) -> None:
    nodes = Nodes(ManualClock(100))

    async def before(office: Office) -> None:
        await office.leads()
        await office.coordinator.want(SPEC)
        await office.until(Phase.SERVING)

    async def after(office: Office) -> None:
        office.nodes.alive = {A}
        await office.until(Phase.SERVING, A)

    run(journal, before, nodes=nodes)
    run(journal, after, nodes=nodes)


def test_a_standby_that_restarts_alone_still_knows_what_the_fleet_wanted(tmp_path: Path, journal: Journal) -> None:
    nodes = Nodes(ManualClock(100))

    async def leader(office: Office) -> None:
        await office.leads()
        await office.coordinator.want(SPEC)
        await office.until(Phase.SERVING)
        remember(other, office.said[-1])  # as the standby's agent does

    async def standby(office: Office) -> None:
        await office.until(Phase.SERVING)
        assert office.coordinator.lease.fencing_epoch == 2

    other = Journal(tmp_path / "other.db")
    run(journal, leader, nodes=nodes)
    run(other, standby, eager=False, nodes=nodes, me=B)
    other.close()
