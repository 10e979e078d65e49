"""Limits: what a plan must keep to, and what is said when none can."""

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from tests.plan.test_placement_laws import problems

from shoal.ids import NodeId
from shoal.plan.budget import StepBudget
from shoal.plan.cost import Priced, Span, meets, objective_value, price
from shoal.plan.exact import enumerate_best, placements, satisfies
from shoal.plan.placement import place
from shoal.plan.problem import Infeasible, Limits, Plan, Problem

Chain = Callable[..., Problem]
LAWS = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
ENDLESS = 10**9


@st.composite
def limited(draw: st.DrawFn) -> Problem:
    """A small problem with limits near what its placements give, so that they bind, and sometimes contradict each other."""
    problem = draw(problems())
    priced = every(problem)
    if not priced:
        return replace(problem, limits=Limits(latency_s=1.0))
    names = draw(st.sets(st.sampled_from(Limits.__struct_fields__), min_size=1, max_size=3))
    chosen = {name: getattr(draw(st.sampled_from(priced)).estimate, name) for name in sorted(names)}
    slack = draw(st.sampled_from([1.0, 1.0, 1.2, 0.9]))
    return replace(problem, limits=Limits(**{name: slack * value for name, value in chosen.items()}))


def every(problem: Problem) -> list[Priced]:
    """All placements of a problem, priced; the judge shares only the cost model with the solvers."""
    links = {(link.source, link.target) for link in problem.links}
    found = []
    for spans in placements(problem):
        if satisfies(problem, spans) and _linked(problem, spans, links):
            found.append(price(problem, spans))
    return found


def _linked(problem: Problem, spans: tuple[Span, ...], links: set[tuple[NodeId, NodeId]]) -> bool:
    nodes = [span.node for span in spans]
    pairs = [*zip(nodes, nodes[1:], strict=False), (problem.source, nodes[0]), (nodes[-1], problem.source)]
    return all(a == b or (a, b) in links for a, b in [*pairs, (nodes[-1], nodes[0])])


@LAWS
@given(limited())
def test_a_plan_keeps_its_limits_and_is_the_best_that_does(problem: Problem) -> None:
    best = enumerate_best(problem)

    answer = place(problem, StepBudget(ENDLESS))

    match answer:
        case Plan():
            assert best is not None
            assert meets(problem.limits, answer.estimate)
            optimum = objective_value(problem.objective, best.estimate)
            assert objective_value(problem.objective, answer.estimate) == pytest.approx(optimum, rel=1e-8, abs=1e-12)
            assert answer.gap == pytest.approx(0, abs=1e-8)
        case Infeasible():
            assert best is None, (answer, best)


@LAWS
@given(limited())
def test_a_search_that_is_cut_short_keeps_limits_and_its_bound_is_true(problem: Problem) -> None:
    best = enumerate_best(problem)

    answer = place(problem, StepBudget(3))

    if isinstance(answer, Plan):
        assert best is not None
        assert meets(problem.limits, answer.estimate)
        optimum = objective_value(problem.objective, best.estimate)
        assert answer.lower_bound <= optimum * (1 + 1e-8) + 1e-12
