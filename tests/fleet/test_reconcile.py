"""From a plan to a pipeline that serves, by orders that may be lost."""

import random

import msgspec
import pytest

from shoal.fleet.order import Hold, Order, Retire, Wire
from shoal.fleet.reconcile import Phase, broken, cut_pairs, heard, missing_orders, phase, promised_bytes, sources
from shoal.fleet.report import NodeFacts, NodeReport, ShardId, ShardReport, ShardState
from shoal.fleet.spec import DeploymentSpec
from shoal.fleet.state import (
    DRAINED_AFTER_S,
    DeploymentDropped,
    DeploymentWanted,
    FleetState,
    NodeHeard,
    PlanMade,
    PlanServed,
    apply,
    drained,
)
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.plan.problem import Estimate, Objective, Plan, RequestShape, Stage

NODES = (NodeId("a"), NodeId("b"), NodeId("c"))
CHAT = DeploymentId("chat")
FACTS = NodeFacts(name="box", version="0.1.0", locators=(), cores=2, memory_total_bytes=8, memory_budget_bytes=4)
SPEC = DeploymentSpec(deployment=CHAT, model="m", manifest=Digest("d"), source=NODES[0])


def plan(*nodes: NodeId) -> Plan:
    stages = tuple(
        Stage(
            node=node,
            start=i,
            stop=i + 1,
            weights_bytes=10,
            kv_bytes=1,
            memory_bytes=12,
            prefill_s=0.1,
            decode_s=0.1,
            send_prefill_s=0.0,
            send_decode_s=0.0,
        )
        for i, node in enumerate(nodes)
    )
    figures = Estimate(time_to_first_token_s=1, time_per_output_token_s=1, tokens_per_s=1, latency_s=1)
    return Plan(
        stages=stages,
        objective=Objective.LATENCY,
        shape=RequestShape(),
        estimate=figures,
        lower_bound=1,
        gap=0,
        solver="test",
    )


class SimulatedNodes:
    """Nodes that follow orders one step at a time, as the shard keeper does."""

    def __init__(self) -> None:
        self.shards: dict[NodeId, dict[ShardId, ShardReport]] = {node: {} for node in NODES}
        self.sequence = 0
        self.births = 0

    def obey(self, node: NodeId, order: Order) -> None:
        mine = self.shards[node]
        match order:
            case Hold():
                self.births += 1
                fresh = ShardReport(
                    shard=order.shard,
                    state=ShardState.FETCHING,
                    start=order.start,
                    stop=order.stop,
                    memory_bytes=order.memory_bytes,
                    attempt=order.attempt,
                    birth=self.births,
                )
                if order.shard not in mine or mine[order.shard].attempt < order.attempt:
                    mine[order.shard] = fresh
            case Wire():
                held = mine.get(order.shard)
                if held is not None and held.state in {ShardState.READY, ShardState.WIRED}:
                    mine[order.shard] = msgspec.structs.replace(
                        held, state=ShardState.WIRED, wired_to=order.next_locators, wired_birth=order.next_birth
                    )
            case Retire():
                mine.pop(order.shard, None)

    def work(self) -> None:
        following = {ShardState.FETCHING: ShardState.LOADING, ShardState.LOADING: ShardState.READY}
        for node, mine in self.shards.items():
            for shard, held in mine.items():
                if held.state in following:
                    mine[shard] = msgspec.structs.replace(
                        held, state=following[held.state], locators=(f"tcp/{node}:{shard.stage}",)
                    )

    def tell(self, state: FleetState, now_s: float) -> FleetState:
        self.sequence += 1
        for node, mine in self.shards.items():
            said = NodeReport(
                node=node, incarnation=1, sequence=self.sequence, facts=FACTS, shards=tuple(mine.values())
            )
            state = apply(state, NodeHeard(report=said, at_s=now_s))
        return state


def wanted(answer: Plan, epoch: int = 1) -> FleetState:
    state = apply(FleetState(), DeploymentWanted(spec=SPEC))
    return apply(state, PlanMade(deployment=CHAT, plan_epoch=epoch, answer=answer, at_s=0.0))


def settle(state: FleetState, nodes: SimulatedNodes, *, keep: float = 1.0, seed: int = 0) -> FleetState:
    """Rounds of report, order and work, each order arriving with probability *keep*."""
    dice = random.Random(seed)
    for tick in range(200):
        state = nodes.tell(state, float(tick))
        orders = missing_orders(state, 1, float(tick))
        if not orders and phase(state.deployments[CHAT], heard(state, float(tick))) is Phase.SERVING:
            return state
        for addressed in orders:
            if dice.random() < keep:
                nodes.obey(addressed.node, addressed.order)
        nodes.work()
    pytest.fail("the deployment did not settle in 200 rounds")


@pytest.mark.parametrize("members", [NODES[:1], NODES[:2], NODES])
def test_a_plan_becomes_a_pipeline_that_serves(members: tuple[NodeId, ...]) -> None:
    nodes = SimulatedNodes()

    state = settle(wanted(plan(*members)), nodes)

    assert [len(nodes.shards[n]) for n in members] == [1] * len(members)
    assert missing_orders(state, 1, 0.0) == ()


@pytest.mark.parametrize("seed", range(5))
def test_lost_orders_delay_a_deployment_but_do_not_derail_it(seed: int) -> None:
    nodes = SimulatedNodes()

    settle(wanted(plan(*NODES)), nodes, keep=0.3, seed=seed)

    assert all(len(mine) == 1 for mine in nodes.shards.values())


def test_workers_are_told_what_their_slots_share() -> None:
    def told(shape: RequestShape) -> list[int]:
        state = SimulatedNodes().tell(wanted(msgspec.structs.replace(plan(*NODES[:2]), shape=shape)), 0.0)
        return [a.order.cache_tokens for a in missing_orders(state, 1, 0.0) if isinstance(a.order, Hold)]

    assert told(RequestShape(context_tokens=2048, slots=8)) == [8 * 2048] * 2
    assert told(RequestShape(context_tokens=2048, slots=8, cache_tokens=4096)) == [4096] * 2


def test_a_new_plan_retires_the_shards_of_the_old_one() -> None:
    nodes = SimulatedNodes()
    state = settle(wanted(plan(*NODES)), nodes)

    moved = apply(state, PlanMade(deployment=CHAT, plan_epoch=2, answer=plan(*NODES[:2]), at_s=1.0))
    settle(moved, nodes)

    assert {shard.plan_epoch for mine in nodes.shards.values() for shard in mine} == {2}
    assert nodes.shards[NODES[2]] == {}


def test_dropping_a_deployment_retires_everything_it_held() -> None:
    nodes = SimulatedNodes()
    state = settle(wanted(plan(*NODES)), nodes)

    gone = apply(state, DeploymentDropped(deployment=CHAT, generation=1))
    for addressed in missing_orders(gone, 1, 0.0):
        nodes.obey(addressed.node, addressed.order)

    assert all(not mine for mine in nodes.shards.values())


def test_a_lost_node_breaks_the_plan_and_says_which_stage() -> None:
    nodes = SimulatedNodes()
    state = settle(wanted(plan(*NODES[:2])), nodes)
    reports = heard(state, 0.0)
    del reports[NODES[1]]

    assert broken(state.deployments[CHAT], reports) == "node b of stage 1 is gone"
    assert phase(state.deployments[CHAT], reports) is Phase.RECOVERING


def served(state: FleetState) -> FleetState:
    return apply(state, PlanServed(deployment=CHAT, plan_epoch=1))


def test_a_node_that_restarted_without_its_worker_is_given_its_shard_again_and_its_neighbour_is_linked_to_it() -> None:
    nodes = SimulatedNodes()
    state = served(settle(wanted(plan(*NODES)), nodes))
    nodes.shards[NODES[1]].clear()

    state = nodes.tell(state, 0.0)
    assert phase(state.deployments[CHAT], heard(state, 0.0)) is Phase.MENDING
    settle(state, nodes)

    (first,), (second,) = nodes.shards[NODES[0]].values(), nodes.shards[NODES[1]].values()
    assert first.wired_birth == second.birth == 4, "the fourth worker that was started"


def test_a_worker_that_was_started_again_where_it_was_before_is_linked_anew() -> None:
    nodes = SimulatedNodes()
    state = served(settle(wanted(plan(*NODES)), nodes))
    shard, held = next(iter(nodes.shards[NODES[1]].items()))
    nodes.shards[NODES[1]][shard] = msgspec.structs.replace(held, state=ShardState.READY, birth=9, wired_to=())

    state = nodes.tell(state, 0.0)
    assert broken(state.deployments[CHAT], heard(state, 0.0)) == ""
    assert phase(state.deployments[CHAT], heard(state, 0.0)) is Phase.MENDING
    settle(state, nodes)

    assert next(iter(nodes.shards[NODES[0]].values())).wired_birth == 9


def test_a_stage_may_be_wired_while_one_further_down_is_not_even_asked_for() -> None:
    nodes = SimulatedNodes()
    state = settle(wanted(plan(*NODES)), nodes)
    nodes.shards[NODES[2]].clear()
    shard, held = next(iter(nodes.shards[NODES[1]].items()))
    nodes.shards[NODES[1]][shard] = msgspec.structs.replace(held, state=ShardState.READY, wired_to=())

    state = nodes.tell(state, 0.0)

    assert broken(state.deployments[CHAT], heard(state, 0.0)) == ""


def test_a_failed_shard_breaks_the_plan_with_its_reason() -> None:
    nodes = SimulatedNodes()
    state = settle(wanted(plan(*NODES[:2])), nodes)
    shard, held = next(iter(nodes.shards[NODES[1]].items()))
    nodes.shards[NODES[1]][shard] = msgspec.structs.replace(held, state=ShardState.FAILED, error="out of memory")

    state = nodes.tell(state, 0.0)

    assert "out of memory" in broken(state.deployments[CHAT], heard(state, 0.0))


def reports_of(*, complete: tuple[NodeId, ...], heard: tuple[NodeId, ...] = NODES) -> dict[NodeId, NodeReport]:
    """Reports in which *complete* have all of the model."""
    return {
        node: NodeReport(
            node=node,
            incarnation=1,
            sequence=1,
            facts=FACTS,
            manifests=(SPEC.manifest,) if node in complete else (),
        )
        for node in heard
    }


def test_chunks_are_asked_of_those_who_have_all_then_of_the_source_then_of_everybody_else() -> None:
    a, b, c = NODES

    def asked(asker: NodeId, source: NodeId, reports: dict[NodeId, NodeReport]) -> tuple[NodeId, ...]:
        return sources(SPEC.manifest, reports, asker=asker, source=source)

    assert asked(NodeId("d"), b, reports_of(complete=(c,))) == (c, b, a)
    assert asked(NodeId("d"), b, reports_of(complete=())) == (b, a, c)
    assert asked(a, a, reports_of(complete=(a,))) == (b, c), "a source that lost a chunk gets it from the others"


def test_a_source_that_is_not_heard_is_asked_last() -> None:
    a, b, c = NODES

    found = sources(SPEC.manifest, reports_of(complete=(), heard=(b, c)), asker=b, source=a)

    assert found == (c, a)


def test_a_stage_that_sees_its_neighbour_fall_silent_breaks_the_plan_for_as_long_as_it_says_so() -> None:
    nodes = SimulatedNodes()
    state = settle(wanted(plan(*NODES[:2])), nodes)
    shard, held = next(iter(nodes.shards[NODES[0]].items()))
    silent = {"error_code": "shard_lost", "error": "stage 1 has shown no sign of life for 10 s"}

    nodes.shards[NODES[0]][shard] = msgspec.structs.replace(held, **silent)
    state = nodes.tell(state, 0.0)
    assert broken(state.deployments[CHAT], heard(state, 0.0)).endswith("stage 1 has shown no sign of life for 10 s")

    nodes.shards[NODES[0]][shard] = held
    state = nodes.tell(state, 0.0)
    assert broken(state.deployments[CHAT], heard(state, 0.0)) == ""


def test_a_stage_that_cannot_dial_the_next_one_breaks_the_plan_once_that_one_listens_there() -> None:
    nodes = SimulatedNodes()
    state = settle(wanted(plan(*NODES[:2])), nodes)
    shard, held = next(iter(nodes.shards[NODES[0]].items()))
    there, elsewhere = held.wired_to or _locators(nodes, NODES[1]), ("tcp/elsewhere:1",)
    cannot = {"state": ShardState.READY, "error_code": "node_unreachable", "error": "a cannot reach b"}

    said = {}
    for target in (there, elsewhere):
        report = msgspec.structs.replace(held, **cannot, wired_to=target, next_node=NODES[1])
        nodes.shards[NODES[0]][shard] = report
        state = nodes.tell(state, 0.0)
        reports = heard(state, 0.0)
        said[target] = broken(state.deployments[CHAT], reports)

    assert "a cannot reach b" in said[there]
    assert said[elsewhere] == "", "the next stage may just be starting again"
    assert cut_pairs(reports.values()) == {(NODES[0], NODES[1])}


def _locators(nodes: SimulatedNodes, node: NodeId) -> tuple[str, ...]:
    return next(iter(nodes.shards[node].values())).locators


def test_memory_is_promised_to_others_from_the_moment_of_the_order() -> None:
    nodes = SimulatedNodes()
    state = wanted(plan(*NODES[:2]))
    state = nodes.tell(state, 0.0)
    for addressed in missing_orders(state, 1, 0.0):
        nodes.obey(addressed.node, addressed.order)
    state = nodes.tell(state, 0.0)
    reports = heard(state, 0.0).values()

    assert promised_bytes(reports, (), DeploymentId("another")) == {NODES[0]: 12, NODES[1]: 12, NODES[2]: 0}
    assert promised_bytes(reports, (), CHAT) == dict.fromkeys(NODES, 0)


def test_memory_is_promised_to_others_from_the_moment_of_the_plan_and_counted_once() -> None:
    nodes = SimulatedNodes()
    state = nodes.tell(wanted(plan(*NODES[:2])), 0.0)
    deployments = state.deployments.values()
    another = DeploymentId("another")
    expected = {NODES[0]: 12, NODES[1]: 12, NODES[2]: 0}

    assert promised_bytes(heard(state, 0.0).values(), deployments, another) == expected

    for addressed in missing_orders(state, 1, 0.0):
        nodes.obey(addressed.node, addressed.order)
    state = nodes.tell(state, 0.0)

    assert promised_bytes(heard(state, 0.0).values(), deployments, another) == expected


def leaving(state: FleetState, node: NodeId, live_requests: int, at_s: float) -> FleetState:
    """*state* after everybody was heard at *at_s*, *node* with the word that it leaves."""
    for name, member in state.members.items():
        shards = tuple(
            msgspec.structs.replace(s, live_requests=live_requests if s.shard.stage == 0 else 0)
            for s in member.report.shards
        )
        said = msgspec.structs.replace(
            member.report, sequence=member.report.sequence + 1, shards=shards, leaving=name == node
        )
        state = apply(state, NodeHeard(report=said, at_s=at_s))
    return state


def standing_of(state: FleetState, at_s: float) -> tuple[Phase, str]:
    """Phase of the deployment, and why its plan is broken."""
    deployment, reports, gone = state.deployments[CHAT], heard(state, at_s), drained(state, CHAT)
    return phase(deployment, reports, is_drained=gone), broken(deployment, reports, is_drained=gone)


@pytest.fixture
def serving() -> FleetState:
    """Two stages at work, heard at second 0."""
    nodes = SimulatedNodes()
    return nodes.tell(settle(wanted(plan(*NODES[:2])), nodes), 0.0)


@pytest.mark.parametrize("leaver", NODES[:2])
def test_a_plan_drains_for_as_long_as_a_request_is_served_and_is_then_made_anew(
    serving: FleetState, leaver: NodeId
) -> None:
    state = serving
    for at_s in (1.0, 2.0, 9.0):
        state = leaving(state, leaver, live_requests=1, at_s=at_s)
        assert standing_of(state, at_s) == (Phase.DRAINING, "")

    state = leaving(state, leaver, live_requests=0, at_s=10.0)
    assert standing_of(state, 10.0) == (Phase.DRAINING, "")

    state = leaving(state, leaver, live_requests=0, at_s=10.0 + DRAINED_AFTER_S)
    assert standing_of(state, 10.0 + DRAINED_AFTER_S) == (Phase.RECOVERING, f"node {leaver} is leaving")


def test_a_request_that_shows_only_after_the_leaving_is_waited_for(serving: FleetState) -> None:
    state = leaving(serving, NODES[1], live_requests=0, at_s=1.0)  # a report older than the request
    state = leaving(state, NODES[1], live_requests=1, at_s=1.2)
    state = leaving(state, NODES[1], live_requests=1, at_s=3.0)
    assert standing_of(state, 3.0) == (Phase.DRAINING, "")

    state = leaving(state, NODES[1], live_requests=0, at_s=3.2)
    state = leaving(state, NODES[1], live_requests=0, at_s=3.3)
    assert standing_of(state, 3.3) == (Phase.DRAINING, ""), "the quiet before the request does not count"


def test_a_first_stage_that_is_not_heard_does_not_count_as_drained(serving: FleetState) -> None:
    state = serving
    for at_s in (0.9, 1.0):
        state = leaving(state, NODES[1], live_requests=0, at_s=at_s)
    assert (CHAT, 1) in state.quiet_since_s

    assert standing_of(state, 1.0 + 1.4 * DRAINED_AFTER_S) == (Phase.DRAINING, "")


def test_the_next_plan_begins_its_own_quiet_and_a_node_that_stays_ends_it(serving: FleetState) -> None:
    state = serving
    for at_s in (1.0, 2.0, 5.0):
        state = leaving(state, NODES[1], live_requests=0, at_s=at_s)
    assert drained(state, CHAT)

    made = PlanMade(deployment=CHAT, plan_epoch=2, answer=plan(*NODES[:2]), at_s=5.0)
    assert not drained(apply(state, made), CHAT)
    for at_s in (5.1, 5.2):  # it was started anew, and does not leave any more
        state = leaving(state, NODES[2], live_requests=0, at_s=at_s)
    assert not drained(state, CHAT)
