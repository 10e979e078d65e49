"""Which of the models that are loaded on demand is to go: decisions on values, and the steps of falling asleep and waking."""

from collections.abc import Callable

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from tests.fleet.test_reconcile import CHAT, NODES, SPEC, SimulatedNodes, plan, settle

from shoal.fleet.demand import NEVER_S, Loaded, due, expired, fewest, idle_longest
from shoal.fleet.deployment import Drowsy
from shoal.fleet.reconcile import Phase, heard, missing_orders, phase
from shoal.fleet.report import NodeFacts, NodeReport, Use
from shoal.fleet.sleep import FellAsleep, RoomAwaited, SleepBegun, Woken
from shoal.fleet.state import DRAINED_AFTER_S, DeploymentWanted, FleetState, NodeHeard, PlanMade, apply
from shoal.ids import DeploymentId, NodeId
from shoal.plan.problem import Infeasible

A, B = NODES[:2]
IDLE = Drowsy(why="nobody has asked for it for 60 s")
NEEDED = Drowsy(why="its memory is needed for code", for_room=True)
FACTS = NodeFacts(name="box", version="1", locators=(), cores=2, memory_total_bytes=99, memory_budget_bytes=99)
ON_DEMAND = msgspec.structs.replace(SPEC, on_demand=True, keep_alive_s=60.0)


def model(
    name: str, *, used_s: float = NEVER_S, busy: bool = False, keep_s: float | None = 60.0, **held: int
) -> Loaded:
    return Loaded(
        deployment=DeploymentId(name),
        plan_epoch=1,
        since_s=0.0,
        last_use_s=used_s,
        keep_alive_s=keep_s,
        busy=busy,
        held={NodeId(node): needed for node, needed in held.items()},
    )


def names(models: tuple[Loaded, ...]) -> list[str]:
    return [m.deployment for m in models]


def test_the_least_recently_used_goes_first_and_what_answers_never() -> None:
    models = [model("new", used_s=30), model("old", used_s=10), model("unasked"), model("busy", used_s=1, busy=True)]

    assert names(idle_longest(models)) == ["unasked", "old", "new"]


def test_a_model_goes_when_its_keep_alive_is_over_counted_from_its_last_answer_or_from_when_it_began_to_serve() -> None:
    models = [model("used", used_s=50), model("unasked"), model("kept", keep_s=None), model("busy", busy=True)]

    assert names(expired(models, 59.0)) == []
    assert names(expired(models, 60.0)) == ["unasked"]
    assert names(expired(models, 110.0)) == ["used", "unasked"]


def test_only_as_many_go_as_are_needed_and_only_where_they_are_needed() -> None:
    order = [model("small", a=2), model("elsewhere", b=9), model("big", a=5), model("newest", a=9)]

    assert names(fewest(order, {A: 2})) == ["small"]
    assert names(fewest(order, {A: 5})) == ["big"], "beside the big one, the small one would go in vain"
    assert names(fewest(order, {A: 6})) == ["small", "big"]
    assert names(fewest(order, {A: 1, B: 1})) == ["small", "elsewhere"]
    assert names(fewest(order, {A: 0, B: -3})) == []


def test_nobody_goes_where_even_all_of_them_would_not_do() -> None:
    assert names(fewest([model("one", a=2, b=2), model("two", a=2)], {A: 5, B: 2})) == ["one"]
    assert names(fewest([model("one", a=2)], {A: 5})) == []


sizes = st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers(0, 9))


@given(st.lists(sizes, max_size=6), st.dictionaries(st.sampled_from(NODES), st.integers(-3, 20)))
def test_whoever_goes_makes_room_and_nobody_goes_in_vain(
    held: list[dict[str, int]], missing: dict[NodeId, int]
) -> None:
    order = [model(str(i), **sizes) for i, sizes in enumerate(held)]

    chosen = fewest(order, missing)

    there = {n: sum(m.held.get(n, 0) for m in order) for n in missing}
    needed = {n: b for n, b in missing.items() if 0 < b <= there[n]}

    def frees(models: list[Loaded]) -> bool:
        return all(sum(m.held.get(n, 0) for m in models) >= b for n, b in needed.items())

    assert frees(list(chosen))
    assert not any(frees([m for m in chosen if m is not one]) for one in chosen)


def told(state: FleetState, use: Use | None, now_s: float, nodes: SimulatedNodes) -> FleetState:
    """*state* after every node was heard, the source with what its gateway is asked."""
    nodes.sequence += 1
    for node, mine in nodes.shards.items():
        uses = (use,) if node == A and use is not None else ()
        said = NodeReport(
            node=node, incarnation=1, sequence=nodes.sequence, facts=FACTS, shards=tuple(mine.values()), uses=uses
        )
        state = apply(state, NodeHeard(report=said, at_s=now_s))
    return state


def awake(nodes: SimulatedNodes) -> FleetState:
    """Its model was asked for, and serves on two nodes."""
    state = apply(FleetState(), DeploymentWanted(spec=ON_DEMAND))
    assert state.deployments[CHAT].asleep, "nothing is loaded before somebody asks"
    state = apply(state, Woken(deployment=CHAT))
    return settle(apply(state, PlanMade(deployment=CHAT, plan_epoch=1, answer=plan(A, B), at_s=0.0)), nodes)


def stands(state: FleetState, now_s: float) -> Phase:
    return phase(state.deployments[CHAT], heard(state, now_s))


def run(state: FleetState, nodes: SimulatedNodes, at_s: list[float], use: Callable[[float], Use | None]) -> FleetState:
    for now_s in at_s:
        state = told(state, use(now_s), now_s, nodes)
        for event in due(state, {CHAT: at_s[0]}, now_s):
            state = apply(state, event)
    return state


def used(idle_s: float, in_flight: int = 0) -> Use:
    return Use(deployment=CHAT, in_flight=in_flight, idle_s=idle_s)


def test_an_idle_model_becomes_drowsy_then_falls_asleep_and_its_shards_are_retired() -> None:
    nodes = SimulatedNodes()
    state = awake(nodes)

    state = run(state, nodes, [100.0, 160.0], lambda now_s: used(now_s - 90.0))
    assert stands(state, 160.0) is Phase.DROWSY
    assert state.deployments[CHAT].drowsy == Drowsy(why="nobody has asked for it for 60 s")

    later = [160.0, 160.2, 160.2 + DRAINED_AFTER_S]
    state = run(state, nodes, later, lambda now_s: used(now_s - 90.0))
    assert stands(state, later[-1]) is Phase.ASLEEP
    for addressed in missing_orders(state, 1, later[-1]):
        nodes.obey(addressed.node, addressed.order)
    assert all(not mine for mine in nodes.shards.values())


def test_a_request_keeps_awake_what_was_about_to_go_for_nothing_but_its_age() -> None:
    nodes = SimulatedNodes()
    state = apply(awake(nodes), SleepBegun(deployment=CHAT, plan_epoch=1, drowsy=IDLE))

    state = run(state, nodes, [100.0, 100.2], lambda _: used(0.0, in_flight=1))

    assert stands(state, 100.2) is Phase.SERVING


def test_a_request_that_came_and_went_between_two_heartbeats_keeps_it_awake_as_well() -> None:
    nodes = SimulatedNodes()
    state = apply(awake(nodes), SleepBegun(deployment=CHAT, plan_epoch=1, drowsy=IDLE))

    state = run(state, nodes, [100.0, 100.2], lambda now_s: used(0.1) if now_s > 100 else used(60.0))

    assert stands(state, 100.2) is Phase.SERVING


def test_a_request_does_not_keep_awake_what_others_were_promised_the_memory_of() -> None:
    nodes = SimulatedNodes()
    state = apply(awake(nodes), SleepBegun(deployment=CHAT, plan_epoch=1, drowsy=NEEDED))

    assert apply(state, Woken(deployment=CHAT)) is state
    state = run(state, nodes, [100.0, 100.0 + DRAINED_AFTER_S], lambda _: used(0.0, in_flight=1))

    assert stands(state, 100.0 + DRAINED_AFTER_S) is Phase.ASLEEP, "it has not begun: it wakes it again"


def test_what_still_answers_does_not_fall_asleep() -> None:
    nodes = SimulatedNodes()
    state = apply(awake(nodes), SleepBegun(deployment=CHAT, plan_epoch=1, drowsy=NEEDED))
    shard, held = next(iter(nodes.shards[A].items()))
    nodes.shards[A][shard] = msgspec.structs.replace(held, live_requests=1)

    state = run(state, nodes, [100.0, 105.0, 110.0], lambda _: used(0.0, in_flight=1))

    assert stands(state, 110.0) is Phase.DROWSY


def test_what_has_no_place_falls_asleep_again_when_nobody_waits_for_it_any_more_and_says_why() -> None:
    nodes = SimulatedNodes()
    state = apply(FleetState(), DeploymentWanted(spec=ON_DEMAND))
    state = apply(apply(state, Woken(deployment=CHAT)), RoomAwaited(deployment=CHAT, why="3 bytes are missing"))

    state = run(state, nodes, [100.0, 109.0, 120.0], lambda _: used(0.0, in_flight=1))
    assert stands(state, 120.0) is Phase.PLANNING

    state = run(state, nodes, [100.0, 120.0], lambda now_s: used(now_s - 111.0))
    assert stands(state, 120.0) is Phase.PLANNING
    state = run(state, nodes, [100.0, 121.0], lambda now_s: used(now_s - 111.0))
    assert stands(state, 121.0) is Phase.ASLEEP
    assert state.deployments[CHAT].waits == "3 bytes are missing"


def test_waking_twice_is_waking_once_and_a_plan_that_was_being_made_does_not_wake() -> None:
    asleep = apply(FleetState(), DeploymentWanted(spec=ON_DEMAND))
    woken = apply(asleep, Woken(deployment=CHAT))

    assert apply(woken, Woken(deployment=CHAT)) is woken
    assert apply(asleep, PlanMade(deployment=CHAT, plan_epoch=1, answer=plan(A), at_s=0.0)) is asleep


def test_what_waits_for_room_is_not_refused_any_more() -> None:
    state = apply(apply(FleetState(), DeploymentWanted(spec=ON_DEMAND)), Woken(deployment=CHAT))
    no = Infeasible(reason="too big", needed_bytes=2, available_bytes=1)
    state = apply(state, PlanMade(deployment=CHAT, plan_epoch=1, answer=no, at_s=0.0))

    state = apply(state, RoomAwaited(deployment=CHAT, why="code is in use"))

    assert stands(state, 0.0) is Phase.PLANNING
    assert apply(state, RoomAwaited(deployment=CHAT, why="code is in use")) is state


def test_only_what_is_loaded_on_demand_and_by_the_plan_that_is_meant_falls_asleep() -> None:
    nodes = SimulatedNodes()
    always = apply(FleetState(), DeploymentWanted(spec=SPEC))
    on_demand = awake(nodes)

    for state, epoch in ((always, 0), (on_demand, 7)):
        assert apply(state, SleepBegun(deployment=CHAT, plan_epoch=epoch, drowsy=NEEDED)) is state
        assert apply(state, FellAsleep(deployment=CHAT, plan_epoch=epoch)) is state
