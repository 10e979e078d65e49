"""Cuts of graphs against every placement there is, on random small graphs."""

import random
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.plan.dag.graphs import Labels, fits, graph_problem, graph_problems, placements, request_s

from shoal.errors import InvalidRequestError
from shoal.plan.budget import StepBudget
from shoal.plan.dag.cost import facts
from shoal.plan.dag.memory import pack
from shoal.plan.dag.placement import place_graph
from shoal.plan.dag.problem import GraphAnswer, GraphPlan, GraphProblem
from shoal.plan.problem import Infeasible

ENOUGH = 10**9
HUNDREDS = settings(max_examples=300)


def labels_of(problem: GraphProblem, plan: GraphPlan) -> Labels:
    """The tier of each operator, and a check that each has one."""
    tiers = {op: k for k, part in enumerate(plan.parts) for op in part.ops}
    assert sorted(tiers) == list(range(len(problem.ops)))
    return tuple(tiers[op] for op in range(len(problem.ops)))


def assert_best(problem: GraphProblem, answer: GraphAnswer, every: Mapping[Labels, float]) -> None:
    if not every:
        assert isinstance(answer, Infeasible), "a plan where there is none"
        return
    assert isinstance(answer, GraphPlan), f"no plan where there are {len(every)}: {answer}"
    best = min(every.values())
    assert every[labels_of(problem, answer)] == pytest.approx(best)
    assert answer.latency_s == pytest.approx(best)
    assert (answer.gap, answer.lower_bound) == (0.0, answer.latency_s)


def placed(problem: GraphProblem, steps: int = ENOUGH) -> GraphAnswer | None:
    """None where pins contradict each other, which is an error that there is no placement for."""
    try:
        return place_graph(problem, StepBudget(steps))
    except InvalidRequestError:
        assert not placements(problem)
        return None


@HUNDREDS
@given(graph_problems(2, most=9))
def test_two_tiers_are_cut_as_well_as_can_be(problem: GraphProblem) -> None:
    answer = place_graph(problem, StepBudget(ENOUGH))

    assert_best(problem, answer, placements(problem))
    assert isinstance(answer, Infeasible) or answer.solver in {"chain", "min-cut"}, "one cut was not enough"


@HUNDREDS
@given(graph_problems(3, most=9))
def test_three_tiers_are_cut_as_well_as_can_be(problem: GraphProblem) -> None:
    answer = place_graph(problem, StepBudget(ENOUGH))

    assert_best(problem, answer, placements(problem))
    assert isinstance(answer, Infeasible) or answer.solver in {"chain", "min-cut"}, "one cut was not enough"


@HUNDREDS
@given(graph_problems(st.integers(2, 3), pinned=True))
def test_pinned_ends_are_kept_at_the_least_cost(problem: GraphProblem) -> None:
    answer = placed(problem)

    if answer is not None:
        assert_best(problem, answer, placements(problem))


@HUNDREDS
@given(graph_problems(st.integers(2, 3), short=True, pinned=True))
def test_short_memory_is_kept_to_at_the_least_cost(problem: GraphProblem) -> None:
    answer = placed(problem)

    if answer is not None:
        assert_best(problem, answer, placements(problem))


@HUNDREDS
@given(graph_problems(st.integers(2, 3), short=True))
def test_the_search_needs_no_placement_to_begin_with(problem: GraphProblem) -> None:
    every = placements(problem)

    packed = pack(facts(problem), StepBudget(ENOUGH))

    assert packed.proven
    assert (packed.labels is None) == (not every)
    if packed.labels is not None:
        assert every[packed.labels] == pytest.approx(min(every.values()))


@HUNDREDS
@given(graph_problems(3, short=True), st.integers(0, 12))
def test_a_search_that_was_cut_off_still_tells_the_truth(problem: GraphProblem, steps: int) -> None:
    every = placements(problem)

    answer = place_graph(problem, StepBudget(steps))

    if isinstance(answer, GraphPlan):
        labels = labels_of(problem, answer)
        assert every[labels] == pytest.approx(answer.latency_s)
        assert answer.lower_bound <= min(every.values()) * (1 + 1e-9)
        assert answer.gap == pytest.approx(1 - answer.lower_bound / answer.latency_s if answer.latency_s else 0.0)
    elif every:
        assert "not proven" in answer.reason


def test_branches_that_wait_count_for_the_bound_whenever_the_search_ends() -> None:
    """Of a hundred graphs of this size, one whose best branch waits while another is followed down."""
    known = facts(graph_problem(random.Random(105), 3, 11, short=True, pinned=False))
    best = pack(known, StepBudget(ENOUGH)).value

    for steps in range(60):
        assert pack(known, StepBudget(steps)).bound <= best * (1 + 1e-9), steps


@given(graph_problems(st.integers(2, 3), short=True))
def test_the_parts_of_a_plan_add_up_to_what_it_promises(problem: GraphProblem) -> None:
    answer = place_graph(problem, StepBudget(ENOUGH))

    if isinstance(answer, GraphPlan):
        labels = labels_of(problem, answer)
        total = sum(part.compute_s + part.send_s + part.return_s for part in answer.parts)
        assert total == pytest.approx(answer.latency_s)
        assert request_s(problem, labels) == pytest.approx(answer.latency_s)
        assert fits(problem, labels)


@given(graph_problems(st.integers(2, 3)))
def test_one_tier_alone_costs_what_it_costs(problem: GraphProblem) -> None:
    answer = place_graph(problem, StepBudget(ENOUGH))

    if isinstance(answer, GraphPlan):
        every = placements(problem)
        for k, alone in enumerate(answer.alternatives):
            whole = (k,) * len(problem.ops)
            assert alone.latency_s == (
                pytest.approx(seconds) if (seconds := request_s(problem, whole)) is not None else None
            )
            assert (whole in every) == (not alone.refused)
