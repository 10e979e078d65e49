"""A deployment that serves moves to another plan; nodes follow orders one step at a time, and a gateway asks all the time."""

from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.fleet.deployment import Deployment, MoveBegun, MoveDropped, MoveEvent, MoveMade, Successor, moved
from shoal.fleet.moves import CLOSE_AT_MOST_S, due, move_orders
from shoal.fleet.order import Hold, Order, Retire, Wire
from shoal.fleet.reconcile import Phase, heard, missing_orders, phase, promised_bytes
from shoal.fleet.report import NodeFacts, NodeReport, ShardId, ShardReport, ShardState
from shoal.fleet.spec import DeploymentSpec
from shoal.fleet.state import (
    DRAINED_AFTER_S,
    DeploymentWanted,
    FleetState,
    NodeHeard,
    PlanMade,
    apply,
    highest_plan_epoch,
)
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.plan.problem import Estimate, Objective, Plan, RequestShape, Stage

A, B, C = (NodeId(letter) for letter in "abc")
CHAT = DeploymentId("chat")
SPEC = DeploymentSpec(deployment=CHAT, model="m", manifest=Digest("d"), source=A)
TICK_S = 0.2
NEED = 10


def plan(*nodes: NodeId, each: int = NEED) -> Plan:
    stages = tuple(
        Stage(
            node=node, start=i, stop=i + 1, weights_bytes=each, kv_bytes=0, memory_bytes=each, prefill_s=0.1,
            decode_s=0.1, send_prefill_s=0.0, send_decode_s=0.0,
        )
        for i, node in enumerate(nodes)
    )  # fmt: skip
    figures = Estimate(time_to_first_token_s=1, time_per_output_token_s=1, tokens_per_s=1, latency_s=1)
    return Plan(
        stages=stages, objective=Objective.LATENCY, shape=RequestShape(), estimate=figures, lower_bound=1, gap=0,
        solver="test",
    )  # fmt: skip


@dataclass
class Fleet:
    """Nodes, coordinator and gateway in lockstep.  `asked`: whether a request comes at every tick; each takes `long_s`."""

    memory: dict[NodeId, int]
    asked: bool = True
    long_s: float = 0.5
    now_s: float = 100.0
    state: FleetState = field(default_factory=FleetState)
    shards: dict[NodeId, dict[ShardId, ShardReport]] = field(default_factory=dict)
    loads: dict[ShardId, Hold] = field(default_factory=dict)
    answering: dict[int, list[float]] = field(default_factory=dict)
    """Per plan epoch: when each running answer ends."""
    waiting: int = 0
    refused: int = 0
    lost: int = 0
    answered: dict[int, int] = field(default_factory=dict)
    gone: set[NodeId] = field(default_factory=set)
    events: list[MoveEvent] = field(default_factory=list)
    leaving: set[NodeId] = field(default_factory=set)
    sequence: int = 0

    def __post_init__(self) -> None:
        self.shards = {node: {} for node in self.memory}
        self.state = apply(self.state, DeploymentWanted(spec=SPEC))

    @property
    def deployment(self) -> Deployment:
        return self.state.deployments[CHAT]

    def obey(self, node: NodeId, order: Order) -> None:
        mine = self.shards[node]
        match order:
            case Hold():
                elders = [s for s in mine if s.plan_epoch < order.shard.plan_epoch and s.plan_epoch not in order.beside]
                for shard in elders if order.load else ():
                    self.end(node, shard)
                fresh = ShardReport(
                    shard=order.shard, state=ShardState.FETCHING, start=order.start, stop=order.stop,
                    memory_bytes=order.memory_bytes,
                )  # fmt: skip
                mine.setdefault(order.shard, fresh)
                self.loads[order.shard] = order
            case Wire():
                if order.shard in mine and mine[order.shard].state is ShardState.READY:
                    mine[order.shard] = msgspec.structs.replace(
                        mine[order.shard], state=ShardState.WIRED, wired_to=order.next_locators
                    )
            case Retire():
                if order.shard in mine:
                    self.end(node, order.shard)

    def end(self, node: NodeId, shard: ShardId) -> None:
        self.lost += len(self.answering.pop(shard.plan_epoch, []))
        del self.shards[node][shard]

    def work(self) -> None:
        following = {ShardState.FETCHING: ShardState.FETCHED, ShardState.LOADING: ShardState.READY}
        for node, mine in self.shards.items():
            for shard, held in list(mine.items()):
                state = following.get(held.state, held.state)
                if state is ShardState.FETCHED and self.loads[shard].load:
                    state = ShardState.LOADING
                mine[shard] = msgspec.structs.replace(held, state=state, locators=(f"tcp/{node}:{shard}",))
            in_memory = {ShardState.LOADING, ShardState.READY, ShardState.WIRED}
            used = sum(s.memory_bytes for s in mine.values() if s.state in in_memory)
            assert used <= self.memory[node], f"{node} holds {used} of {self.memory[node]} bytes"

    def report(self) -> None:
        self.sequence += 1
        for node in self.memory.keys() - self.gone:
            busy = {e: len(ends) for e, ends in self.answering.items()}
            shards = tuple(
                msgspec.structs.replace(s, live_requests=busy.get(s.shard.plan_epoch, 0) if s.shard.stage == 0 else 0)
                for s in self.shards[node].values()
            )
            facts = NodeFacts(
                name=node, version="1", locators=(), cores=1, memory_total_bytes=99,
                memory_budget_bytes=self.memory[node],
            )  # fmt: skip
            said = NodeReport(
                node=node, incarnation=1, sequence=self.sequence, facts=facts, shards=shards,
                leaving=node in self.leaving,
            )  # fmt: skip
            self.state = apply(self.state, NodeHeard(report=said, at_s=self.now_s))

    def ask(self) -> None:
        """As the gateway does: new requests go to the plan that serves, wait for the next, or are refused."""
        for epoch, ends in self.answering.items():
            done = [s for s in ends if s <= self.now_s]
            self.answered[epoch] = self.answered.get(epoch, 0) + len(done)
            self.answering[epoch] = [s for s in ends if s > self.now_s]
        stands = phase(self.deployment, heard(self.state, self.now_s))
        self.waiting += self.asked
        if stands is Phase.SERVING:
            self.answering.setdefault(self.deployment.plan_epoch, []).extend([self.now_s + self.long_s] * self.waiting)
            self.waiting = 0
        elif stands is not Phase.MOVING:
            self.refused, self.waiting = self.refused + self.waiting, 0

    def tick(self) -> None:
        self.now_s += TICK_S
        self.report()
        for event in due(self.state, self.now_s):
            self.events.append(event)
            before, self.state = self.state, apply(self.state, event)
            assert self.state is not before, "an event that is due changes something"
            assert apply(self.state, event) is self.state, "and only once"
        self.ask()
        for addressed in (*missing_orders(self.state, 1, self.now_s), *move_orders(self.state, 1, self.now_s)):
            if addressed.node not in self.gone:
                self.obey(addressed.node, addressed.order)
        self.work()

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / TICK_S)):
            self.tick()

    def place(self, wanted: Plan, epoch: int = 1) -> None:
        """Have *wanted* serve, and requests answered from here on."""
        self.report()
        self.state = apply(self.state, PlanMade(deployment=CHAT, plan_epoch=epoch, answer=wanted, at_s=self.now_s))
        asked, self.asked = self.asked, False
        self.run(2.0)
        assert phase(self.deployment, heard(self.state, self.now_s)) is Phase.SERVING
        self.asked = asked

    def move(self, wanted: Plan, *, waits: bool = False, epoch: int = 2) -> None:
        heir = Successor(plan_epoch=epoch, plan=wanted, why="51 -> 31 ms per token", waits=waits)
        begun = MoveBegun(deployment=CHAT, from_epoch=self.deployment.plan_epoch, successor=heir)
        self.state = apply(self.state, begun)

    def held(self) -> dict[NodeId, set[int]]:
        return {n: {s.plan_epoch for s in mine} for n, mine in self.shards.items() if mine}

    def kinds(self) -> list[str]:
        return [type(event).__name__ for event in self.events]


def test_with_memory_for_both_plans_no_request_waits_or_fails_and_the_old_one_ends_its_answers() -> None:
    fleet = Fleet({A: 2 * NEED, B: NEED, C: NEED}, long_s=3.0)
    fleet.place(plan(A, B))
    fleet.run(2.0)
    fleet.move(plan(A, C))
    fleet.run(10.0)

    assert (fleet.refused, fleet.lost) == (0, 0)
    assert fleet.kinds() == ["MoveMade", "MoveEnded"]
    assert fleet.held() == {A: {2}, C: {2}}
    assert fleet.deployment == Deployment(
        spec=SPEC, plan_epoch=2, answer=plan(A, C), planned_s=fleet.deployment.planned_s, moved="51 -> 31 ms per token"
    )
    assert all(fleet.answered.get(epoch, 0) > 5 for epoch in (1, 2))


def test_the_old_plan_goes_only_when_its_first_stage_has_said_for_a_second_that_it_answers_nobody() -> None:
    fleet = Fleet({A: 2 * NEED, B: NEED, C: NEED}, asked=False)
    fleet.place(plan(A, B))
    fleet.answering[1] = [fleet.now_s + 6.0]
    fleet.move(plan(A, C))
    while "MoveEnded" not in fleet.kinds():
        fleet.tick()
        if fleet.now_s > 200:
            pytest.fail(f"it never ended: {fleet.kinds()}")

    assert (fleet.lost, fleet.answered[1]) == (0, 1)
    made = next(e for e in fleet.events if isinstance(e, MoveMade))
    assert fleet.now_s - made.at_s > 5.0 + DRAINED_AFTER_S - 2 * TICK_S


def test_without_memory_for_both_plans_requests_wait_and_none_fails() -> None:
    fleet = Fleet({A: NEED, B: NEED, C: NEED}, long_s=1.0)
    fleet.place(plan(A, B))
    fleet.run(2.0)
    fleet.move(plan(A, C), waits=True)
    fleet.run(1.0)
    assert [s.state for s in fleet.shards[C].values()] == [ShardState.READY], "what fits is loaded before"
    assert [s.state for s in fleet.shards[A].values()] == [ShardState.WIRED, ShardState.FETCHED]
    fleet.run(10.0)

    assert (fleet.refused, fleet.lost, fleet.waiting) == (0, 0, 0)
    assert fleet.kinds() == ["MoveClosing", "MoveMade", "MoveEnded"]
    assert fleet.held() == {A: {2}, C: {2}}


RELAY = 3


def relayed(first: NodeId, by: NodeId, last: NodeId) -> Plan:
    """Two blocks and frames that pass through *by* there and back: one process, which counts once."""
    whole = plan(first, last, first)
    one, two, three = whole.stages
    there, back = (
        msgspec.structs.replace(one, node=by, start=at, stop=at, memory_bytes=of) for at, of in ((1, RELAY), (2, 0))
    )
    return msgspec.structs.replace(whole, stages=(one, there, two, back, three))


@pytest.mark.parametrize(("room", "steps"), [(2, ["MoveMade"]), (1, ["MoveClosing", "MoveMade"])])
def test_a_deployment_moves_to_relays_and_away_from_them_like_to_any_other_stage(room: int, steps: list[str]) -> None:
    fleet = Fleet({A: room * 2 * NEED, B: room * NEED, C: NEED + RELAY}, long_s=1.0)
    fleet.place(plan(A, B, A))
    fleet.move(relayed(A, C, B))
    fleet.run(10.0)
    assert fleet.held() == {A: {2}, B: {2}, C: {2}}
    assert {s.state for mine in fleet.shards.values() for s in mine.values()} == {ShardState.WIRED}

    fleet.move(plan(A, C), epoch=3)
    fleet.run(10.0)

    assert (fleet.refused, fleet.lost, fleet.waiting) == (0, 0, 0)
    assert fleet.kinds()[: len(steps)] == steps
    assert fleet.kinds().count("MoveEnded") == 2
    assert fleet.held() == {A: {3}, C: {3}}


def test_answers_that_take_too_long_to_wait_for_put_the_move_off_and_go_on() -> None:
    fleet = Fleet({A: NEED, B: NEED, C: NEED}, asked=False)
    fleet.place(plan(A, B))
    fleet.answering[1] = [fleet.now_s + 1000]
    fleet.move(plan(A, C), waits=True)
    fleet.run(2.0)
    fleet.asked, fleet.long_s = True, 0.5
    fleet.run(CLOSE_AT_MOST_S + 3.0)

    assert fleet.kinds() == ["MoveClosing", "MoveDropped"]
    assert f"{CLOSE_AT_MOST_S:g} s" in fleet.events[-1].why
    assert (fleet.refused, fleet.lost, fleet.waiting) == (0, 0, 0)
    assert fleet.held() == {A: {1}, B: {1}}
    assert phase(fleet.deployment, heard(fleet.state, fleet.now_s)) is Phase.SERVING


@pytest.mark.parametrize("after_s", [0.2, 0.6, 1.0])
def test_a_successor_whose_node_is_lost_is_dropped_and_nobody_notices(after_s: float) -> None:
    fleet = Fleet({A: 2 * NEED, B: NEED, C: NEED})
    fleet.place(plan(A, B))
    fleet.move(plan(A, C))
    fleet.run(after_s)
    fleet.gone = {C}
    fleet.run(6.0)

    if "MoveMade" not in fleet.kinds():
        assert fleet.kinds() == ["MoveDropped"]
        assert C in fleet.events[0].why
        assert fleet.refused == 0
        assert fleet.held()[A] == {1}


def test_a_successor_that_stands_takes_over_when_the_old_plan_breaks_first() -> None:
    fleet = Fleet({A: NEED, B: NEED, C: NEED}, asked=False)
    fleet.place(plan(A, B))
    fleet.answering[1] = [fleet.now_s + 1000]
    fleet.move(plan(A, C), waits=True)
    fleet.run(3.0)
    fleet.gone = {B}
    fleet.run(8.0)

    assert fleet.kinds() == ["MoveClosing", "MoveMade", "MoveEnded"]
    assert fleet.deployment.plan_epoch == 2
    assert phase(fleet.deployment, heard(fleet.state, fleet.now_s)) is Phase.SERVING


def test_a_move_to_a_node_that_leaves_is_dropped() -> None:
    fleet = Fleet({A: 2 * NEED, B: NEED, C: NEED}, asked=False)
    fleet.place(plan(A, B))
    fleet.move(plan(A, C))
    fleet.run(0.4)
    fleet.leaving = {C}
    fleet.run(2.0)

    assert fleet.kinds() == ["MoveDropped"]
    assert "leaving" in fleet.events[0].why


def test_a_successor_that_no_longer_fits_alone_is_dropped_with_the_bytes() -> None:
    fleet = Fleet({A: 2 * NEED, B: NEED, C: NEED - 1}, asked=False)
    fleet.place(plan(A, B))
    fleet.move(plan(A, C))
    fleet.run(1.0)

    assert [type(e) for e in fleet.events] == [MoveDropped]
    assert "10 B" in fleet.events[0].why


@given(
    spare=st.tuples(*[st.integers(0, NEED)] * 3),
    old=st.permutations((A, B, C)).flatmap(
        lambda p: st.integers(1, 3).map(lambda n: (A, *[x for x in p if x != A])[:n])
    ),
    new=st.permutations((A, B, C)).flatmap(
        lambda p: st.integers(1, 3).map(lambda n: (A, *[x for x in p if x != A])[:n])
    ),
    long_s=st.floats(0.1, 5.0),
)
def test_whatever_the_plans_and_the_memory_no_request_fails_and_the_move_is_made(
    spare: tuple[int, ...], old: tuple[NodeId, ...], new: tuple[NodeId, ...], long_s: float
) -> None:
    fleet = Fleet(dict(zip((A, B, C), (NEED + extra for extra in spare), strict=True)), long_s=long_s)
    fleet.place(plan(*old))
    fleet.run(1.0)
    fleet.move(plan(*new))
    fleet.run(20.0)

    assert (fleet.refused, fleet.lost) == (0, 0)
    assert fleet.held() == {node: {2} for node in new}
    assert fleet.kinds()[-1] == "MoveEnded"


def test_epochs_of_both_plans_are_taken_and_others_count_with_the_memory_of_both() -> None:
    fleet = Fleet({A: 2 * NEED, B: NEED, C: NEED}, asked=False)
    fleet.place(plan(A, B))
    fleet.move(plan(A, C), epoch=7)

    assert highest_plan_epoch(fleet.state) == 7
    reports = heard(fleet.state, fleet.now_s)
    promised = promised_bytes(reports.values(), fleet.state.deployments.values(), DeploymentId("other"))
    assert promised == {A: 2 * NEED, B: NEED, C: NEED}


def test_a_step_that_does_not_follow_from_where_the_move_stands_changes_nothing() -> None:
    heir = Successor(plan_epoch=3, plan=plan(A), why="")
    stands = Deployment(spec=SPEC, plan_epoch=1, answer=plan(A, B))
    begun = MoveBegun(deployment=CHAT, from_epoch=1, successor=heir)
    under_way = moved(stands, begun)
    assert under_way is not None

    assert moved(stands, MoveMade(deployment=CHAT, plan_epoch=3, at_s=0.0)) is None
    assert moved(stands, msgspec.structs.replace(begun, from_epoch=2)) is None
    assert moved(under_way, begun) is None
    assert moved(under_way, MoveMade(deployment=CHAT, plan_epoch=4, at_s=0.0)) is None
    made = moved(under_way, MoveMade(deployment=CHAT, plan_epoch=3, at_s=0.0))
    assert made is not None
    again = msgspec.structs.replace(begun, from_epoch=3, successor=msgspec.structs.replace(heir, plan_epoch=4))
    assert moved(made, again) is None, "the last one is not at its end"
