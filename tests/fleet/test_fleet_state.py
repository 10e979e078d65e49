"""The coordinator's picture of its fleet."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.fleet.report import NodeFacts, NodeReport
from shoal.fleet.spec import DeploymentSpec
from shoal.fleet.state import (
    HINT_RACE_S,
    LOST_AFTER_S,
    VANISHED_LOST_AFTER_S,
    DeploymentDropped,
    DeploymentWanted,
    Event,
    FleetState,
    NodeForgotten,
    NodeHeard,
    NodeVanished,
    PlanMade,
    Standing,
    apply,
    lost_in_haste,
    standing,
)
from shoal.ids import DeploymentId, Digest, NodeId
from shoal.plan.problem import Estimate, Infeasible, Objective, Plan, RequestShape, Stage

A, B = NodeId("a"), NodeId("b")
CHAT = DeploymentId("chat")
NO_ROOM = Infeasible(reason="too big", needed_bytes=2, available_bytes=1)


ON_BOTH = Plan(
    stages=tuple(
        Stage(
            node=node, start=i, stop=i + 1, weights_bytes=1, kv_bytes=1, memory_bytes=2, prefill_s=1, decode_s=1,
            send_prefill_s=0, send_decode_s=0,
        )
        for i, node in enumerate((A, B))
    ),
    objective=Objective.LATENCY, shape=RequestShape(), lower_bound=1, gap=0, solver="test",
    estimate=Estimate(time_to_first_token_s=1, time_per_output_token_s=1, tokens_per_s=1, latency_s=1),
)  # fmt: skip


def facts(name: str = "box") -> NodeFacts:
    return NodeFacts(name=name, version="0.1.0", locators=(), cores=2, memory_total_bytes=8, memory_budget_bytes=4)


def report(node: NodeId, incarnation: int = 1, sequence: int = 1, *, leaving: bool = False) -> NodeReport:
    return NodeReport(node=node, incarnation=incarnation, sequence=sequence, facts=facts(), leaving=leaving)


def spec(generation: int = 1) -> DeploymentSpec:
    return DeploymentSpec(deployment=CHAT, model="m", manifest=Digest("d"), source=A, generation=generation)


nodes = st.sampled_from([A, B])
small = st.integers(1, 4)
events: st.SearchStrategy[Event] = st.one_of(
    st.builds(
        lambda n, i, s, leaving: NodeHeard(report=report(n, i, s, leaving=leaving), at_s=float(10 * i + s)),
        nodes,
        small,
        small,
        st.booleans(),
    ),
    st.builds(lambda n, i, s: NodeVanished(node=n, incarnation=i, at_s=10 * i + s + 0.05), nodes, small, small),
    st.builds(NodeForgotten, node=nodes, incarnation=small),
    st.builds(lambda g: DeploymentWanted(spec=spec(g)), small),
    st.builds(lambda g: DeploymentDropped(deployment=CHAT, generation=g), small),
    st.builds(
        lambda e, answer: PlanMade(deployment=CHAT, plan_epoch=e, answer=answer, at_s=float(e)),
        small,
        st.sampled_from([NO_ROOM, ON_BOTH]),
    ),
)


@given(st.lists(events, max_size=12))
def test_repeating_an_event_changes_nothing(history: list[Event]) -> None:
    state = FleetState()
    for event in history:
        state = apply(state, event)
        assert apply(state, event) == state


@given(st.lists(events, max_size=12))
def test_neither_plan_epochs_nor_generations_fall_while_a_deployment_lives(history: list[Event]) -> None:
    state = FleetState()
    for event in history:
        before = state.deployments.get(CHAT)
        state = apply(state, event)
        after = state.deployments.get(CHAT)
        if before is not None and after is not None:
            assert after.plan_epoch >= before.plan_epoch
            assert after.spec.generation >= before.spec.generation


def test_an_older_heartbeat_does_not_replace_a_newer_one() -> None:
    state = apply(FleetState(), NodeHeard(report=report(A, sequence=5), at_s=1.0))

    late = apply(state, NodeHeard(report=report(A, sequence=4), at_s=2.0))

    assert late == state


def test_a_restarted_node_is_itself_again() -> None:
    state = apply(FleetState(), NodeHeard(report=report(A, incarnation=1, sequence=900), at_s=1.0))

    back = apply(state, NodeHeard(report=report(A, incarnation=2, sequence=1), at_s=9.0))

    assert back.members[A].report.incarnation == 2
    assert list(back.members) == [A]


def test_a_goodbye_of_an_earlier_life_does_not_remove_the_restarted_node() -> None:
    state = apply(FleetState(), NodeHeard(report=report(A, incarnation=2), at_s=1.0))

    assert apply(state, NodeForgotten(node=A, incarnation=1)) == state


@pytest.mark.parametrize(
    ("silent_s", "expected"),
    [
        (0.0, Standing.ALIVE),
        (0.79, Standing.ALIVE),
        (0.8, Standing.SUSPECT),
        (2.49, Standing.SUSPECT),
        (2.5, Standing.LOST),
    ],
)
def test_silence_makes_a_node_suspect_within_a_second_and_lost_within_three(
    silent_s: float, expected: Standing
) -> None:
    member = apply(FleetState(), NodeHeard(report=report(A), at_s=10.0)).members[A]

    assert standing(member, 10.0 + silent_s) is expected


def vanished(at_s: float = 10.1, incarnation: int = 1) -> FleetState:
    """A node that was heard at second 10, and whose process was seen to end."""
    state = apply(FleetState(), NodeHeard(report=report(A, sequence=5), at_s=10.0))
    return apply(state, NodeVanished(node=A, incarnation=incarnation, at_s=at_s))


@pytest.mark.parametrize(
    ("silent_s", "expected"),
    [
        (0.1, Standing.SUSPECT),
        (VANISHED_LOST_AFTER_S - 0.01, Standing.SUSPECT),
        (VANISHED_LOST_AFTER_S, Standing.LOST),
    ],
)
def test_a_node_whose_process_was_seen_to_end_is_suspect_at_once_and_lost_within_a_second(
    silent_s: float, expected: Standing
) -> None:
    assert standing(vanished().members[A], 10.0 + silent_s) is expected
    assert VANISHED_LOST_AFTER_S < 1


def test_a_node_whose_link_was_seen_to_end_is_lost_in_haste_until_its_silence_alone_proves_it() -> None:
    hint, silence = vanished(), apply(FleetState(), NodeHeard(report=report(A), at_s=10.0))

    assert not lost_in_haste(hint, 10.0 + VANISHED_LOST_AFTER_S - 0.01), "not lost"
    assert lost_in_haste(hint, 10.0 + VANISHED_LOST_AFTER_S)
    assert not lost_in_haste(hint, 10.0 + LOST_AFTER_S)
    assert not lost_in_haste(silence, 10.0 + LOST_AFTER_S)


def test_a_node_that_is_heard_again_was_only_cut_off_for_a_moment() -> None:
    state = apply(vanished(at_s=10.1), NodeHeard(report=report(A, sequence=6), at_s=10.3))

    assert standing(state.members[A], 10.4) is Standing.ALIVE
    assert standing(state.members[A], 10.3 + VANISHED_LOST_AFTER_S) is not Standing.LOST


def test_a_last_heartbeat_that_was_under_way_does_not_bring_a_dead_node_back() -> None:
    heard_s = 10.1 + HINT_RACE_S / 2
    state = apply(vanished(at_s=10.1), NodeHeard(report=report(A, sequence=6), at_s=heard_s))

    assert standing(state.members[A], heard_s) is Standing.SUSPECT
    assert standing(state.members[A], heard_s + VANISHED_LOST_AFTER_S) is Standing.LOST


def test_the_end_of_an_earlier_life_says_nothing_about_the_node_that_was_started_again() -> None:
    assert vanished(incarnation=0).members[A].vanished_s is None
    again = apply(vanished(at_s=10.1), NodeHeard(report=report(A, incarnation=2), at_s=10.11))

    assert standing(again.members[A], 10.2) is Standing.ALIVE


def test_a_leaving_node_is_leaving_however_fresh() -> None:
    member = apply(FleetState(), NodeHeard(report=report(A, leaving=True), at_s=0.0)).members[A]

    assert standing(member, 0.1) is Standing.LEAVING


def test_a_plan_for_a_deployment_that_was_dropped_is_ignored() -> None:
    made = PlanMade(deployment=CHAT, plan_epoch=1, answer=NO_ROOM, at_s=0.0)

    assert apply(FleetState(), made) == FleetState()


def test_a_changed_declaration_asks_for_a_new_plan_but_keeps_counting_epochs() -> None:
    state = apply(FleetState(), DeploymentWanted(spec=spec(1)))
    state = apply(state, PlanMade(deployment=CHAT, plan_epoch=3, answer=NO_ROOM, at_s=0.0))

    changed = apply(state, DeploymentWanted(spec=spec(2)))

    assert changed.deployments[CHAT].answer is None
    assert changed.deployments[CHAT].plan_epoch == 3


def test_a_report_survives_the_wire_and_tolerates_fields_of_a_newer_version() -> None:
    sent = msgspec.to_builtins(report(A))
    sent["invented_later"] = 1

    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=NodeReport) == report(A)


def test_a_leaving_node_that_fell_silent_is_gone() -> None:
    member = apply(FleetState(), NodeHeard(report=report(A, leaving=True), at_s=0.0)).members[A]

    assert standing(member, LOST_AFTER_S) is Standing.LOST
