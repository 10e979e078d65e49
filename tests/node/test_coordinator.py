"""The coordinator's loop: plans, orders, a first lease; with nodes that obey at once, and a planner that is told its answers."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import msgspec
import pytest

from shoal.clock import ManualClock
from shoal.errors import InvalidRequestError, UnavailableError, UnknownModelError
from shoal.fleet.order import Accepted, Hold, Refused, Reply, Retire, Wire
from shoal.fleet.reconcile import Addressed, Phase
from shoal.fleet.report import NodeFacts, NodeReport, ShardId, ShardReport, ShardState
from shoal.fleet.spec import DeploymentSpec
from shoal.fleet.state import LOST_AFTER_S
from shoal.fleet.view import LEASE_S, CoordinatorView, Lease
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.node.attendance import AWAY_AFTER_S
from shoal.node.coordinator import Coordinator
from shoal.node.journal import Journal
from shoal.node.patience import RETRY_PLAN_S
from shoal.plan.problem import Answer, Estimate, Infeasible, Objective, Plan, Problem, RequestShape, Stage
from shoal.profile.fleet import FleetProfile

TICK_S = 0.005
A, B, C = (NodeId(letter * 32) for letter in "abc")
CHAT = DeploymentId("chat")
SPEC = DeploymentSpec(deployment=CHAT, model="m", manifest=Digest("d"), source=A)
FACTS = NodeFacts(name="box", version="1", locators=(), cores=1, memory_total_bytes=9, memory_budget_bytes=9)
NO_ROOM = Infeasible(reason="too big", needed_bytes=9, available_bytes=1, hint="add memory")


def plan(*nodes: NodeId) -> Plan:
    stages = [
        Stage(
            node=node, start=i, stop=i + 1, weights_bytes=1, kv_bytes=1, memory_bytes=2,
            prefill_s=1, decode_s=1, send_prefill_s=0, send_decode_s=0,
        )
        for i, node in enumerate(nodes)
    ]  # fmt: skip
    figures = Estimate(time_to_first_token_s=1, time_per_output_token_s=1, tokens_per_s=1, latency_s=1)
    return Plan(
        stages=tuple(stages), objective=Objective.LATENCY, shape=RequestShape(), estimate=figures, lower_bound=1,
        gap=0, solver="test",
    )  # fmt: skip


@dataclass
class Nodes:
    """Nodes that obey orders in the moment they get them, and the planner's answers: one stage per node that is usable."""

    clock: ManualClock
    alive: set[NodeId] = field(default_factory=lambda: {A, B})
    shards: dict[NodeId, dict[ShardId, ShardReport]] = field(default_factory=dict)
    fence: int = 0
    answer: Callable[[list[NodeId]], Answer] = lambda usable: plan(*sorted(usable))
    problem: Callable[[list[NodeId]], Problem | Infeasible] = lambda _: NO_ROOM
    """What deployments that serve are weighed by."""
    orders: list[Addressed] = field(default_factory=list)
    facts: NodeFacts = FACTS
    live: int = 0
    """Requests under way in every first stage."""
    surveys: int = 0
    sequence: int = 0
    incarnation: int = 1
    coordinating: frozenset[NodeId] = frozenset()
    manifests: tuple[Digest, ...] = ()

    async def survey(self, spec: DeploymentSpec, reports: Mapping[NodeId, NodeReport]) -> FleetProfile:
        self.surveys += 1
        return FleetProfile(profile_epoch=1, devices=(), links=())

    async def plan(self, spec: DeploymentSpec, surveyed: FleetProfile, promised: Mapping[NodeId, int]) -> Answer:
        return self.answer(list(promised))

    async def state(
        self, spec: DeploymentSpec, surveyed: FleetProfile, promised: Mapping[NodeId, int]
    ) -> Problem | Infeasible:
        return self.problem(list(promised))

    async def obey(self, addressed: Addressed) -> Reply:
        self.orders.append(addressed)
        if addressed.node not in self.alive:
            raise UnavailableError("no answer")
        order, mine = addressed.order, self.shards.setdefault(addressed.node, {})
        if order.fencing_epoch < self.fence:
            return Refused(code="stale_lease", text="older", fencing_epoch=self.fence)
        self.fence = order.fencing_epoch
        match order:
            case Hold():
                mine[order.shard] = ShardReport(
                    shard=order.shard,
                    state=ShardState.READY if order.load else ShardState.FETCHED,
                    start=order.start,
                    stop=order.stop,
                    locators=("tcp/x:1",) if order.load else (),
                    memory_bytes=order.memory_bytes,
                    attempt=order.attempt,
                )
            case Wire():
                mine[order.shard] = msgspec.structs.replace(mine[order.shard], state=ShardState.WIRED)
            case Retire():
                mine.pop(order.shard, None)
        return Accepted()

    def reports(self) -> list[NodeReport]:
        self.sequence += 1
        return [
            NodeReport(
                node=node,
                incarnation=self.incarnation,
                sequence=self.sequence,
                facts=msgspec.structs.replace(self.facts, name=node[:1], coordinates=node in self.coordinating),
                shards=tuple(
                    msgspec.structs.replace(s, live_requests=self.live if s.shard.stage == 0 else 0)
                    for s in self.shards.get(node, {}).values()
                ),
                manifests=self.manifests,
            )
            for node in sorted(self.alive)
        ]


@dataclass
class Office:
    """A coordinator at work among *nodes*."""

    coordinator: Coordinator
    nodes: Nodes
    clock: ManualClock
    said: list[CoordinatorView]
    noted: list[str]
    texts: list[str]
    """What was said with each."""

    async def pass_s(self, seconds: float = 0.0, *, quiet: bool = False) -> None:
        """Let time go by in steps that a heartbeat survives; *quiet*: no node is heard meanwhile."""
        steps = max(2, int(seconds / 0.5))
        for _ in range(steps):
            self.clock.advance(seconds / steps)
            for report in () if quiet else self.nodes.reports():
                self.coordinator.hear_report(report)
            await anyio.sleep(2.5 * TICK_S)

    async def see(self, condition: Callable[[], object]) -> None:
        """Let time go by, heartbeats heard, until *condition* holds: the loop has a disk to wait for at times."""
        for _ in range(400):
            if condition():
                return
            await self.pass_s(0.5)
        pytest.fail(f"not seen; noted: {self.noted}, said last: {self.said[-1:]}")

    async def leads(self) -> None:
        await self.see(lambda: self.coordinator.leading)

    async def until(self, phase: Phase, *on: NodeId) -> None:
        """Until the deployment is in *phase*, placed *on* these nodes if any are named."""

        def there() -> bool:
            status = self.said[-1].find(CHAT) if self.said else None
            if status is None or status.phase is not phase:
                return False
            answer = status.deployment.answer
            return not on or (isinstance(answer, Plan) and [s.node for s in answer.stages] == [*on])

        await self.see(there)


def run(
    journal: Journal,
    use: Callable[[Office], Awaitable[None]],
    *,
    eager: bool = True,
    nodes: Nodes | None = None,
    me: NodeId = A,
) -> Nodes:
    clock = nodes.clock if nodes else ManualClock(100)
    fleet = nodes or Nodes(clock)
    said: list[CoordinatorView] = []
    noted: list[str] = []
    texts: list[str] = []

    def note(kind: str, text: str, **_: object) -> None:
        noted.append(kind)
        texts.append(text)

    def begin(epoch: int) -> None:
        note(f"lease {epoch}", "")

    async def scenario() -> None:
        coordinator = Coordinator(
            me=me,
            journal=journal,
            clock=clock,
            planner=fleet,
            send_order=fleet.obey,
            broadcast=said.append,
            note=note,
            begin_log=begin,
            eager=eager,
            tick_s=TICK_S,
        )
        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                group.start_soon(coordinator.run)
                await use(Office(coordinator, fleet, clock, said, noted, texts))
                group.cancel_scope.cancel()

    anyio.run(scenario)
    return fleet


def test_the_first_node_leads_at_once_and_a_standby_waits_for_the_lease_to_end(
    tmp_path: Path, journal: Journal
) -> None:
    async def first(office: Office) -> None:
        await office.leads()
        assert office.coordinator.lease == Lease(holder=A, fencing_epoch=1)

    async def standby(office: Office) -> None:
        await office.pass_s(LEASE_S - 0.5)
        assert office.coordinator.lease is None
        with pytest.raises(InvalidRequestError, match="nobody yet"):
            await office.coordinator.want(SPEC)
        await office.leads()

    run(journal, first)
    other = Journal(tmp_path / "other.db")
    run(other, standby, eager=False)
    other.close()


def test_a_deployment_is_planned_held_wired_and_served_and_its_shards_go_when_it_is_dropped(journal: Journal) -> None:
    async def use(office: Office) -> None:
        await office.leads()
        await office.coordinator.want(SPEC)
        await office.until(Phase.SERVING)
        kinds = [type(o.order) for o in office.nodes.orders]
        assert kinds.index(Hold) < kinds.index(Wire)
        assert {o.node for o in office.nodes.orders} == {A, B}

        await office.coordinator.drop(CHAT)
        await office.see(lambda: not any(office.nodes.shards.values()))
        with pytest.raises(UnknownModelError):
            await office.coordinator.drop(CHAT)

    run(journal, use)
    assert not journal.all("deployment", msgspec.Raw)


def test_the_stage_of_a_lost_node_goes_to_another_and_the_others_hear_nothing_of_it(journal: Journal) -> None:
    async def use(office: Office) -> None:
        await office.leads()
        await office.coordinator.want(SPEC)
        await office.until(Phase.SERVING)
        first, orders = office.said[-1].find(CHAT).deployment, len(office.nodes.orders)

        office.nodes.alive = {A, C}
        await office.until(Phase.SERVING, A, C)

        after = office.said[-1].find(CHAT).deployment
        assert (after.plan_epoch, after.mends, after.attempts) == (first.plan_epoch, 1, (0, 1))
        assert "plan.mended" in office.noted
        told = [o.order for o in office.nodes.orders[orders:] if o.node == A]
        assert not [order for order in told if not isinstance(order, Wire)], "at most where its frames go now"
        assert [n for n in office.noted if n in {"node.suspect", "node.lost"}] == ["node.suspect", "node.lost"]

    run(journal, use)


def test_a_node_whose_link_flaps_keeps_its_plan_though_no_other_fits_without_it(journal: Journal) -> None:
    async def use(office: Office) -> None:
        answers: list[float] = []

        def answer(usable: list[NodeId]) -> Answer:
            answers.append(office.clock.now_s())
            return plan(A, B) if B in usable else NO_ROOM

        office.nodes.answer = answer
        await office.leads()
        await office.coordinator.want(SPEC)
        await office.until(Phase.SERVING)
        before, orders, asked = office.said[-1].find(CHAT).deployment, len(office.nodes.orders), len(answers)

        office.nodes.alive = {A}
        office.coordinator.hear_vanished(B, 1)
        await office.see(lambda: len(answers) > asked)
        office.nodes.alive = {A, B}
        await office.until(Phase.SERVING)
        assert office.said[-1].find(CHAT).deployment == before
        assert office.nodes.orders[orders:] == [], "nothing was unloaded"

        office.nodes.alive = {A}
        office.coordinator.hear_vanished(B, 1)
        await office.until(Phase.REFUSED)
        assert answers[-1] - office.coordinator.state.members[B].heard_s >= LOST_AFTER_S

    run(journal, use)


@pytest.mark.parametrize("came", ["restarted", "after a while", "after a moment"])
def test_a_node_that_was_restarted_or_long_away_ends_the_pauses_between_plans_and_a_link_that_flaps_does_not(
    came: str, journal: Journal
) -> None:
    async def use(office: Office) -> None:
        tries: list[float] = []

        def answer(_: list[NodeId]) -> Answer:
            tries.append(office.clock.now_s())
            raise UnavailableError("not measured")

        office.nodes.answer = answer
        await office.leads()
        await office.coordinator.want(SPEC)
        await office.see(lambda: len(tries) == 4)

        office.nodes.alive = {A}
        office.coordinator.hear_vanished(B, 1)
        await office.see(lambda: office.noted[-1] == "node.lost")
        if came == "after a while":
            office.coordinator._patience._not_before_s[CHAT] = float("inf")
            await office.pass_s(AWAY_AFTER_S + 1)
        office.nodes.incarnation += came == "restarted"
        office.nodes.alive = {A, B}
        came_s = office.clock.now_s()
        await office.see(lambda: len(tries) == 5)

        assert (tries[4] - came_s < RETRY_PLAN_S) is (came != "after a moment")

    run(journal, use)


def test_what_fits_nowhere_is_refused_with_its_reason_until_it_fits(journal: Journal) -> None:
    async def use(office: Office) -> None:
        office.nodes.answer = lambda usable: plan(*sorted(usable)) if C in usable else NO_ROOM
        await office.leads()
        await office.coordinator.want(SPEC)
        await office.until(Phase.REFUSED)
        assert "too big; add memory" in office.said[-1].find(CHAT).reason

        office.nodes.alive.add(C)
        await office.until(Phase.SERVING)

    run(journal, use)


@pytest.mark.parametrize("news", ["a node", "the model"])
def test_what_had_no_place_is_planned_at_once_when_what_it_lacked_comes_however_often_it_was_tried(
    news: str, journal: Journal
) -> None:
    async def use(office: Office) -> None:
        tries: list[float] = []

        def answer(usable: list[NodeId]) -> Answer:
            tries.append(office.clock.now_s())
            if C not in usable and not office.nodes.manifests:
                raise UnavailableError("not measured")
            return plan(*sorted(usable))

        office.nodes.answer = answer
        await office.leads()
        await office.coordinator.want(SPEC)
        await office.see(lambda: len(tries) == 4)
        assert tries[3] - tries[2] > 2 * RETRY_PLAN_S, "it is tried ever more rarely"

        if news == "a node":
            office.nodes.alive.add(C)
        else:
            office.nodes.manifests = (SPEC.manifest,)
        came_s = office.clock.now_s()
        await office.until(Phase.SERVING)
        assert tries[-1] - came_s < RETRY_PLAN_S

    run(journal, use)


def test_heartbeats_correct_what_is_known_while_this_node_leads(journal: Journal) -> None:
    """A standby's planner has measured nothing that could be corrected."""
    heard: list[tuple[NodeId, dict[DeploymentId, Digest]]] = []

    async def scenario(office: Office) -> None:
        office.coordinator.heard = lambda report, served: heard.append((report.node, dict(served)))
        office.coordinator.hear_report(office.nodes.reports()[0])
        assert not heard
        await office.leads()
        await office.coordinator.want(SPEC)
        heard.clear()
        office.coordinator.hear_report(office.nodes.reports()[0])

    run(journal, scenario)
    assert heard[-1] == (A, {SPEC.deployment: SPEC.manifest})
