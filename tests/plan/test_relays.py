"""When plans relay: where the way round is better, or where there is no other; and what relays take of memory."""

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from shoal.ids import NodeId
from shoal.plan.budget import StepBudget
from shoal.plan.cost import Span, price
from shoal.plan.pareto import Front, pareto
from shoal.plan.placement import place
from shoal.plan.problem import Infeasible, Limits, LinkSpec, Objective, Pin, Plan, Problem, Residency

Chain = Callable[..., Problem]
N0, N1, N2 = (NodeId(f"n{i}") for i in range(3))


@pytest.fixture
def one_way(chain: Chain) -> Problem:
    """Two blocks of which the source holds one; nothing leads from it to n1, which reaches it, but by way of n2."""
    found = chain((1, 1), (1.0, 1.0, 9.0), (1, 1, 0), {(0, 2): 0.01, (2, 1): 0.01}, relay_if_needed=True)
    home = LinkSpec(source=N1, target=N0, latency_s=0.01, bytes_per_s=1e9)
    return replace(found, links=(*found.links, home))


def places(plan: Plan) -> list[tuple[str, int, int]]:
    return [(s.node, s.start, s.stop) for s in plan.stages]


RELAYED = [("n0", 0, 1), ("n2", 1, 1), ("n1", 1, 2)]


def test_a_hop_without_a_link_goes_through_a_third_device(one_way: Problem) -> None:
    plan = place(one_way, StepBudget(10**6))

    assert isinstance(plan, Plan)
    assert places(plan) == RELAYED
    assert plan.gap == 0


def test_the_way_home_is_not_relayed(one_way: Problem) -> None:
    cut = replace(one_way, links=tuple(link for link in one_way.links if (link.source, link.target) != (N1, N0)))

    answer = place(replace(cut, pins=(Pin(block=1, node=N1),)), StepBudget(10**6))

    assert isinstance(answer, Infeasible)
    assert "pins" in answer.reason, "relays would not help: they are not what is proposed"
    assert "relay" not in answer.hint


def test_with_the_last_block_at_home_frames_are_relayed_both_ways(chain: Chain) -> None:
    """The source and n1 have no link at all: the tokens are made where they are wanted."""
    links = {(0, 2): 0.01, (2, 1): 0.01}
    problem = chain((1, 1, 1), (1.0, 1.0, 9.0), (2, 1, 0), links, relay_if_needed=True, pin_last=True)

    plan = place(problem, StepBudget(10**6))

    assert isinstance(plan, Plan)
    assert places(plan) == [("n0", 0, 1), ("n2", 1, 1), ("n1", 1, 2), ("n2", 2, 2), ("n0", 2, 3)]


def test_where_relays_are_for_need_a_slower_direct_way_is_taken(chain: Chain) -> None:
    problem = chain((1, 1), (1.0, 1.0, 9.0), (1, 1, 0), {(0, 1): 1.0, (0, 2): 0.01, (2, 1): 0.01})

    needed, always = (
        place(replace(problem, **said), StepBudget(10**6)) for said in ({"relay_if_needed": True}, {"relay": True})
    )

    assert isinstance(needed, Plan)
    assert isinstance(always, Plan)
    assert places(needed) == [("n0", 0, 1), ("n1", 1, 2)]
    assert places(always) == RELAYED


def test_a_plan_that_needs_no_relay_leaves_no_room_for_one(chain: Chain) -> None:
    """Each device has room for its worker and a block, and not for a second process."""
    problem = chain((1, 1), (1.0, 1.0), (4, 4), {(0, 1): 0.01}, relay_if_needed=True)
    problem = replace(problem, devices=tuple(replace(d, fixed_bytes=3) for d in problem.devices))

    plan = place(problem, StepBudget(10**6))
    cramped = place(replace(problem, relay=True), StepBudget(10**6))

    assert isinstance(plan, Plan)
    assert [stage.memory_bytes for stage in plan.stages] == [4, 4]
    assert isinstance(cramped, Infeasible)


def test_a_limit_that_only_a_relay_keeps_is_a_need(chain: Chain) -> None:
    problem = chain((1, 1), (1.0, 1.0, 9.0), (1, 1, 0), {(0, 1): 1.0, (0, 2): 0.01, (2, 1): 0.01}, relay_if_needed=True)

    plan = place(replace(problem, limits=Limits(latency_s=3.5)), StepBudget(10**6))

    assert isinstance(plan, Plan)
    assert places(plan) == RELAYED


def test_activations_pass_through_no_device_that_they_may_not_enter(one_way: Problem) -> None:
    regions = ("eu", "eu", "us")
    devices = tuple(replace(d, region=region) for d, region in zip(one_way.devices, regions, strict=True))
    ruled = replace(one_way, devices=devices, residency=Residency(regions=("eu",)))

    assert isinstance(place(ruled, StepBudget(10**6)), Infeasible)
    assert isinstance(place(replace(ruled, residency=Residency()), StepBudget(10**6)), Plan)


def test_an_excluded_device_does_not_relay_either(one_way: Problem) -> None:
    assert isinstance(place(replace(one_way, exclude=(N2,)), StepBudget(10**6)), Infeasible)


def test_without_leave_to_relay_the_answer_says_what_would_help(one_way: Problem) -> None:
    answer = place(replace(one_way, relay_if_needed=False, pins=(Pin(block=1, node=N1),)), StepBudget(10**6))

    assert isinstance(answer, Infeasible)
    assert "allow relays" in answer.hint


def test_a_front_is_found_through_relays_where_there_is_no_other(one_way: Problem) -> None:
    both = (Objective.LATENCY, Objective.THROUGHPUT)

    front = pareto(one_way, StepBudget(10**6), both)
    refused = pareto(replace(one_way, relay_if_needed=False), StepBudget(10**6), both)

    assert isinstance(front, Front)
    assert {tuple(places(plan)) for plan in front.points} == {tuple(RELAYED)}
    assert isinstance(refused, Infeasible)


def test_memory_of_a_devices_stages_adds_up_to_one_process_for_all_its_relays(chain: Chain) -> None:
    links = {(0, 1): 0.1, (1, 2): 0.1, (0, 2): 0.1}
    problem = replace(chain((1, 1, 1, 1), (1.0,) * 3, (9, 9, 9), links), relay=True)
    problem = replace(problem, devices=tuple(replace(d, fixed_bytes=3) for d in problem.devices))
    bare = [Span(N0, 0, 1), Span(N1, 1, 1), Span(N2, 1, 3), Span(N1, 3, 3), Span(N0, 3, 4)]
    beside = [Span(N0, 0, 1), Span(N1, 1, 1), Span(N2, 1, 2), Span(N1, 2, 4)]

    assert [stage.memory_bytes for stage in price(problem, bare).stages] == [7, 3, 8, 0, 7]
    assert [stage.memory_bytes for stage in price(problem, beside).stages] == [7, 0, 7, 8]
