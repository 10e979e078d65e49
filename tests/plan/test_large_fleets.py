"""Plans for more devices than a search over all sets can take."""

import sys

import pytest
from msgspec.structs import replace
from tests.plan.fleets import Family, fleet

from shoal.plan.budget import StepBudget
from shoal.plan.circuit import CIRCUIT
from shoal.plan.cost import Span, objective_value
from shoal.plan.cpsat import installed
from shoal.plan.crowd import SITES
from shoal.plan.elementary import LABELS
from shoal.plan.exact import satisfies
from shoal.plan.placement import place
from shoal.plan.problem import Answer, Infeasible, Objective, Plan, Problem
from shoal.plan.search import WITHOUT

needs_solver = pytest.mark.skipif(not installed(), reason="OR-tools is not installed")


def solved(problem: Problem, steps: int = 10**9) -> Plan:
    answer: Answer = place(problem, StepBudget(steps))
    assert isinstance(answer, Plan), answer
    assert satisfies(problem, [Span(stage.node, stage.start, stage.stop) for stage in answer.stages])
    assert answer.lower_bound <= objective_value(problem.objective, answer.estimate) * (1 + 1e-9)
    return answer


@needs_solver
@pytest.mark.parametrize("links", ["mesh", "star", "sites"])
def test_twenty_devices_and_eighty_layers_are_proven(links: str) -> None:
    plan = solved(fleet(Family(devices=20, layers=80, links=links), 3))

    assert (plan.solver, plan.gap) == (CIRCUIT, 0.0)
    assert any("proven best without trying" in reason.text for reason in plan.reasons)


@needs_solver
def test_layers_of_two_kinds_in_turn_are_cut_inside_of_a_layer_where_that_is_best_and_proven() -> None:
    """Attention and feed-forward blocks: on some fleets a device has room for one more half of a layer."""
    plans = [solved(fleet(Family(devices=14, layers=20, kinds=(1.0, 0.4), tight=1.2), seed)) for seed in range(3)]

    assert all(plan.gap == 0.0 for plan in plans)
    assert any((stage.stop - 1) % 2 for plan in plans for stage in plan.stages[:-1])


@needs_solver
def test_throughput_of_many_devices_is_proven_in_one_programme() -> None:
    family = Family(devices=16, layers=40, in_flight=8, objective=Objective.THROUGHPUT)

    plan = solved(fleet(family, 2))
    slow = solved(replace(fleet(family, 2), objective=Objective.LATENCY))

    assert (plan.solver, plan.gap) == (CIRCUIT, 0.0)
    assert plan.estimate.tokens_per_s > slow.estimate.tokens_per_s
    assert plan.estimate.latency_s >= slow.estimate.latency_s


@needs_solver
def test_with_nearly_equal_layers_the_gap_is_small() -> None:
    plan = solved(fleet(Family(devices=16, layers=24, spread=0.01), 4))

    assert plan.solver in {CIRCUIT, LABELS}
    assert 0 <= plan.gap < 0.05


@needs_solver
def test_the_same_problem_has_the_same_plan_on_every_run() -> None:
    problem = fleet(Family(devices=15, layers=30), 5)

    assert solved(problem) == solved(problem)


@needs_solver
def test_a_fleet_without_room_is_refused() -> None:
    assert isinstance(place(fleet(Family(devices=16, layers=40, tight=0.7), 1), StepBudget(300)), Infeasible)


def test_without_the_solver_identical_blocks_are_proven_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ortools", None)

    plan = solved(fleet(Family(devices=16, layers=24, tight=2.5), 1))

    assert (plan.solver, plan.gap) == (SITES, 0.0)


def test_without_the_solver_blocks_of_two_kinds_say_so_and_state_their_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ortools", None)

    plan = solved(fleet(Family(devices=16, layers=12, kinds=(1.0, 0.4), tight=2.5), 1), steps=0)

    assert plan.solver == WITHOUT
    assert plan.gap > 0
