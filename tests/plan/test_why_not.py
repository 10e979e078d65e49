"""What is said when a search came back without a plan."""

import dataclasses

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tests.plan.test_placement_laws import problems

from shoal.plan.arrays import INF
from shoal.plan.budget import StepBudget
from shoal.plan.cost import Span, barred, owners
from shoal.plan.exact import enumerate_best, satisfies
from shoal.plan.placement import LEAST_MISSING, why_not
from shoal.plan.problem import Infeasible, Plan, Problem
from shoal.plan.search import NOTHING
from shoal.plan.tables import build_tables

LAWS = settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])


def has_devices(problem: Problem) -> bool:
    out = barred(problem)
    return not set(owners(problem).values()) & out.keys() and len(out) < len(problem.devices)


@LAWS
@given(problems())
def test_looking_for_what_is_missing_finds_the_plan_that_a_search_cut_short_did_not(problem: Problem) -> None:
    assume(has_devices(problem) and enumerate_best(problem) is not None)

    answer = why_not(problem, build_tables(problem), dataclasses.replace(NOTHING, bound=0.0), StepBudget(10**9))

    assert isinstance(answer, Plan)
    assert answer.solver == LEAST_MISSING
    assert answer.lower_bound == 0
    assert satisfies(problem, [Span(stage.node, stage.start, stage.stop) for stage in answer.stages])


@LAWS
@given(problems(), st.sampled_from([0, 2, 10**9]))
def test_what_is_proven_is_not_called_unproven(problem: Problem, steps: int) -> None:
    assume(has_devices(problem) and enumerate_best(problem) is None)

    answer = why_not(problem, build_tables(problem), dataclasses.replace(NOTHING, bound=INF), StepBudget(steps))

    assert isinstance(answer, Infeasible)
    assert "not proven" not in answer.reason
